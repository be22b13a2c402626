"""Data sets of the hub, without a hub: the calls of `datasets`, and the resulting rows and splits."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

import lorakit
from lorakit.training import hub as module
from lorakit.training.data import Data, read_data
from lorakit.training.hub import Hub
from lorakit.training.rows import DataError

SOURCE = str(Path(lorakit.__file__).parents[1])
CONVERTED = "refs/convert/parquet"
GLUE = {
    "train": [{"sentence": "good", "label": 1, "idx": 0}, {"sentence": "bad", "label": 0, "idx": 1}],
    "validation": [{"sentence": "fine", "label": 1, "idx": 0}],
    "test": [{"sentence": "unknown", "label": -1, "idx": 0}],  # GLUE keeps these labels to itself
}
TEXT = {"text": "sentence"}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the hub was asked for in this process; it has the data sets of every owner but `nobody`."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    names = []

    def dataset_info(api: Any, name: str, **_: Any) -> None:
        names.append(name)
        if name.startswith("nobody") or name == "d.j":
            response = httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co"))
            raise RepositoryNotFoundError("404 Client Error.\nmany lines", response=response)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    return names


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of load_dataset, which returns GLUE's tables."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*args: Any, **settings: Any) -> dict[str, Any]:
        calls.append((args, settings))
        return GLUE

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


def test_named_splits_are_read_and_no_others(asked: list[Any]) -> None:
    splits = {"train": "train", "valid": "validation", "test": None}
    data = read_data("owner/name", fields=TEXT, hub=Hub("sst2", "v1.0", splits))
    assert asked == [(("owner/name", "sst2"), {"revision": "v1.0"})]
    assert (data.labels, [example.label for example in data.train]) == (("0", "1"), ["1", "0"])
    assert [(example.where, example.text) for example in data.valid] == [("owner/name/validation row 1", "fine")]
    assert data.test == []


def test_train_is_read_where_only_another_split_is_named(asked: list[Any]) -> None:
    data = read_data("owner/name", fields=TEXT, hub=Hub(splits={"train": None, "valid": None, "test": "validation"}))
    assert [[example.text for example in split] for split in (data.train, data.valid, data.test)] == [
        ["good", "bad"],
        [],
        ["fine"],
    ]


def test_splits_go_by_their_usual_names_where_none_is_named(asked: list[Any]) -> None:
    with pytest.raises(DataError, match=r"owner/name/test row 1: the label '-1' does not occur in train"):
        read_data("owner/name", fields=TEXT)
    assert asked == [(("owner/name", None), {"revision": None})]


@pytest.mark.parametrize(("named", "missing"), [({"valid": "dev"}, "dev"), ({"train": "training"}, "training")])
def test_a_split_that_is_not_there_is_an_error_with_those_that_are(
    named: dict[str, str | None], missing: str, asked: list[Any]
) -> None:
    with pytest.raises(ValueError, match=f"^owner/name has no split '{missing}'; it has train, validation, test.$"):
        read_data("owner/name", hub=Hub(splits=named))


# --- the hub's Parquet copy ------------------------------------------------------------------------------------------


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the hub's Parquet copies: NAME/SUBSET/SPLIT/*.parquet below it."""
    monkeypatch.setattr(module, "_CONVERTED_FOLDER", f"{tmp_path}/copies/{{name}}")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "copies"


def table(path: Path, rows: list[dict[str, Any]], **types: Any) -> None:
    """Write rows with the types that a data set of the hub declares."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {name: types.get(name, datasets.Value("string")) for name in rows[0]},
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def pairs(data: Data) -> list[tuple[str | None, ...]]:
    return [(example.prompt, example.completion, *example.others) for example in data.train]


FIELDS = {"prompt": "mr", "completion": "ref"}
SPLITS: dict[str, str | None] = {"train": "train", "valid": "validation", "test": None}


def restaurants(copies: Path) -> None:
    for split, files in {"train": ["ab", "c"], "validation": ["d"]}.items():
        for number, names in enumerate(files):
            rows = [{"mr": f"name[{name}]", "ref": f"It is {name}."} for name in names]
            table(copies / f"owner/name/default/{split}/000{number}.parquet", rows)
    broken = copies / "owner/name/default/test/0000.parquet"
    broken.parent.mkdir()
    broken.write_bytes(b"not to be opened")
    table(copies / "owner/name/other/train/0000.parquet", [{"mr": "name[x]", "ref": "It is x."}])


def test_of_a_converted_revision_the_files_of_the_named_splits_are_read(
    copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    restaurants(copies)
    calls: list[Any] = []
    real = datasets.load_dataset

    def noted(*args: Any, **settings: Any) -> Any:
        calls.append((args, settings))
        return real(*args, **settings)

    monkeypatch.setattr(datasets, "load_dataset", noted)
    data = read_data("owner/name", fields=FIELDS, hub=Hub("default", CONVERTED, SPLITS))
    assert pairs(data) == [("name[a]", "It is a."), ("name[b]", "It is b."), ("name[c]", "It is c.")]
    assert [example.where for example in data.train][-1] == "owner/name/train row 3"
    assert ([example.prompt for example in data.valid], data.test) == (["name[d]"], [])
    files = {split: f"{copies}/owner/name/default/{split}/*.parquet" for split in ("train", "validation")}
    assert calls == [(("parquet",), {"data_files": files})]


def test_of_a_converted_revision_another_subset_is_another_folder(copies: Path) -> None:
    restaurants(copies)
    assert pairs(read_data("owner/name", fields=FIELDS, hub=Hub("other", CONVERTED))) == [("name[x]", "It is x.")]
    # A data set without subsets is in a folder `default`.
    assert len(read_data("owner/name", fields=FIELDS, hub=Hub(None, CONVERTED, SPLITS)).train) == 3


def test_what_a_converted_revision_lacks_is_an_error_with_what_it_has(copies: Path) -> None:
    restaurants(copies)
    with pytest.raises(ValueError, match=r"^owner/name has no split 'dev'; it has test, train, validation\.$"):
        read_data("owner/name", hub=Hub("default", CONVERTED, {"train": "train", "valid": "dev"}))
    with pytest.raises(ValueError, match=r"^owner/name has no subset 'en' in its Parquet copy; it has default, other"):
        read_data("owner/name", hub=Hub("en", CONVERTED))
    with pytest.raises(ValueError, match=r"^owner/gone has no subset 'default' in its Parquet copy; it has none"):
        read_data("owner/gone", hub=Hub(None, CONVERTED))


class HubStandIn(BaseHTTPRequestHandler):
    """What the hub answers to a client that lists and fetches the files of one data set's Parquet copy."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        path, _, _ = unquote(self.path).partition("?")
        commit = "a" * 40  # the revision is resolved once, and may then be called by its commit
        if path in ("/api/datasets/owner/name", f"/api/datasets/owner/name/revision/{CONVERTED}"):
            self.answer(json.dumps({"id": "owner/name", "sha": commit}).encode())
        elif path in (f"/api/datasets/owner/name/tree/{revision}" for revision in (CONVERTED, commit)):
            folders = {str(folder) for file in self.files for folder in Path(file).parents} - {"."}
            entries: list[dict[str, Any]] = [
                {"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)
            ]
            entries += [{"type": "file", "path": p, "size": len(f), "oid": "0" * 40} for p, f in self.files.items()]
            self.answer(json.dumps(entries).encode())
        elif found := re.fullmatch(f"/datasets/owner/name/resolve/(?:{CONVERTED}|{commit})/(.*)", path):
            self.fetched.add(found[1])
            self.answer(self.files[found[1]], found[1], commit)
        else:
            self.send_response(404)
            self.end_headers()

    do_HEAD = do_GET

    def answer(self, body: bytes, name: str = "", commit: str = "") -> None:
        self.send_response(200)
        for header, value in {"ETag": f'"{name}"', "X-Repo-Commit": commit, "Content-Length": len(body)}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def test_the_hubs_parquet_copy_is_listed_and_fetched_by_its_own_client(copies: Path, tmp_path: Path) -> None:
    restaurants(copies)
    folder = copies / "owner" / "name"
    HubStandIn.files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}
    HubStandIn.fetched.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubStandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = f"""
from lorakit.training.data import read_data
from lorakit.training.hub import Hub
data = read_data("owner/name", fields={FIELDS}, hub=Hub("default", {CONVERTED!r}, {SPLITS}))
print([example.completion for example in (*data.train, *data.valid, *data.test)])
"""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_TOKEN": "", "PYTHONPATH": SOURCE}
    try:
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['It is a.', 'It is b.', 'It is c.', 'It is d.']\n"
    train, valid = [f"default/train/000{number}.parquet" for number in (0, 1)], "default/validation/0000.parquet"
    assert HubStandIn.fetched == {*train, valid}


def test_records_become_lines_and_references_right_answers(copies: Path) -> None:
    import datasets

    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    triples = [["Mars Hill College", "JOINED", "1973"], ["Mars Hill College", "LOCATION", "Mars Hill"]]
    dart = {"tripleset": triples, "target": "One joined in 1973.", "references": []}
    other = {"tripleset": triples[:1], "target": "A.", "references": ["A.", "B."]}
    table(copies / "o/dart/default/train/0.parquet", [dart, other], tripleset=datasets.List(texts), references=texts)
    fields = {"prompt": "tripleset", "completion": "target", "references": "references"}
    assert pairs(read_data("o/dart", fields=fields, holdout=0, hub=Hub(None, CONVERTED))) == [
        ("Mars Hill College : JOINED : 1973 | Mars Hill College : LOCATION : Mars Hill", "One joined in 1973."),
        ("Mars Hill College : JOINED : 1973", "A.", "B."),
    ]
    webnlg = {"input": ["Aarhus | leader | Jacob", "Aarhus | area  | 91"], "target": "Jacob leads.", "references": []}
    table(copies / "o/webnlg/en/train/0.parquet", [webnlg], input=texts, target=text, references=texts)
    fields["prompt"] = "input"
    assert pairs(read_data("o/webnlg", fields=fields, holdout=0, hub=Hub("en", CONVERTED))) == [
        ("Aarhus : leader : Jacob | Aarhus : area : 91", "Jacob leads.")
    ]


# --- names that are no data set --------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sets" / "reviews").mkdir(parents=True)
    (tmp_path / "sets" / "reviews" / "train.jsonl").touch()
    (tmp_path / "d.jsonl").touch()
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.csv").touch()
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d.json", "no data set at d.json: no such file or folder. Did you mean 'd.jsonl'?"),
        ("./nothing", "no data set at nothing: no such file or folder"),
        ("~/surely/not/here", "surely/not/here: no such file or folder"),
        ("sets/review", "no data set at sets/review: no such file or folder. Did you mean 'reviews'?"),
        ("set/reviews", "no data set at set/reviews. Did you mean 'sets/reviews'?"),
        ("a/b/c", "no data set at a/b/c: no such file or folder"),
        ("review", "no data set at review. Did you mean 'reviews'? For the hub's data set of that name: https://huggingface.co/datasets/review"),
        ("two words", "no such file or folder"),
    ],
)  # fmt: skip
def test_a_mistyped_path_never_asks_the_hub(name: str, message: str, here: None, known: list[str], asked) -> None:
    with pytest.raises(FileNotFoundError) as error:
        read_data(name)
    assert message in str(error.value)
    assert (known, asked) == ([], [])


def test_what_the_hub_lacks_is_said_without_fetching(here: None, known: list[str], asked: list[Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no file or folder 'd.j' here, and the hub has no such data set\. Did you mean 'd.jsonl'"):  # fmt: skip  # noqa: E501
        read_data("d.j")
    with pytest.raises(FileNotFoundError, match="^no file or folder 'nobody/nothing' here, and the hub has no such"):
        read_data("nobody/nothing")
    assert (known, asked) == (["d.j", "nobody/nothing"], [])


@pytest.mark.parametrize("folder", ["nobody___glue", "datasets--nobody--glue"])
def test_an_earlier_copy_is_read_without_asking(
    folder: str, here: None, tmp_path: Path, known: list[str], asked: list[Any]
) -> None:
    (tmp_path / "cache" / folder).mkdir(parents=True)
    with pytest.raises(DataError, match="the label '-1' does not occur in train"):
        read_data("nobody/glue", fields=TEXT)
    assert known == [] and len(asked) == 1


def test_an_address_is_the_hubs_whatever_lies_here(here: None, known: list[str], asked: list[Any]) -> None:
    with pytest.raises(DataError, match="does not occur in train"):
        read_data("https://huggingface.co/datasets/reviews", fields=TEXT)
    assert known == ["reviews"] and asked[0][0] == ("reviews", None)
    with pytest.raises(DataError, match="does not occur in train"):
        read_data("https://huggingface.co/datasets/owner/name/tree/main", fields=TEXT)
    assert known[1:] == ["owner/name"]


def test_without_a_network_the_error_comes_soon(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    program = "from lorakit.training.data import read_data; import time; waits = []; time.sleep = waits.append\n"
    program += "try: read_data('owner/nothing')\n"
    program += "except FileNotFoundError as error: print(error, sum(waits) < 5)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, "PYTHONPATH": SOURCE}, capture_output=True, text=True
    )
    assert done.stdout.startswith("no file or folder 'owner/nothing' here, and the hub is not reached (")
    assert done.stdout.endswith("True\n")
