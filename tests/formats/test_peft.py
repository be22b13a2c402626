"""PEFT's folder: the same outputs in PEFT itself, both ways; the keys and bytes; and what is refused."""

import hashlib
import json
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit
import models
from in_peft import load_in_peft
from models import train_a_little

TOKENS = torch.arange(14).view(2, 7)


def make_in_peft(base: nn.Module, **settings) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()


CASES = {
    "plain": {},
    "dora": dict(dora=True),
    "rslora": dict(rslora=True),
    "biases": dict(bias="lora_only"),
    "all-biases": dict(bias="all"),
    "patterns": dict(rank_pattern={"*.1.*": 2}, alpha_pattern={"*.0.*": 3}),
    "pissa": dict(init="pissa"),
    "olora": dict(init="olora"),
}


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_peft_reads_what_lorakit_writes_and_back(make, settings: dict, tmp_path: Path) -> None:
    model = make()
    head = ["classifier"] if make is models.bert else []
    lorakit.attach(model, rank=4, alpha=6, also_train=head, **settings)
    train_a_little(model)
    expected = model(TOKENS).logits.detach()
    assert (expected - make()(TOKENS).logits).abs().max() > 0.01

    lorakit.save(model, tmp_path / "ours")
    theirs = load_in_peft(make(), tmp_path / "ours")
    torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=2e-6, rtol=1e-5)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path / "theirs"))
    again = make()
    lorakit.load(again, tmp_path / "theirs")
    torch.testing.assert_close(again(TOKENS).logits, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert])
@pytest.mark.parametrize("dora", [False, True])
def test_lorakit_reads_what_peft_made(make, dora: bool, tmp_path: Path) -> None:
    settings = dict(r=4, lora_alpha=6, target_modules="all-linear", use_dora=dora, init_lora_weights=False)
    if make is models.gpt2:
        settings |= dict(fan_in_fan_out=True)
    if make is models.bert:
        settings |= dict(task_type="SEQ_CLS")  # PEFT then saves the head
    theirs = make_in_peft(make(), **settings)
    expected = theirs(TOKENS).logits.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    model = make()
    adapter = lorakit.load(model, tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=2e-6, rtol=1e-5)
    if make is models.bert:
        assert adapter.also_train == ("classifier",)


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_and_groups_in_peft(dora: bool, tmp_path: Path) -> None:
    targets = ["conv_pw", "0", "6"] if dora else ["conv_dw", "conv_pw", "0", "3", "6"]
    model, images = models.conv_net(), torch.randn(2, 3, 16, 16)
    lorakit.attach(model, targets, rank=2, alpha=3, dora=dora)
    train_a_little(model)
    expected = model(images).detach()
    lorakit.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of groups > 1
        theirs = peft.PeftModel.from_pretrained(models.conv_net(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(images), expected, atol=2e-6, rtol=1e-5)
    again = models.conv_net()
    lorakit.load(again, tmp_path)
    torch.testing.assert_close(again(images), expected)


def test_embedding_in_peft(tmp_path: Path) -> None:
    model = models.llama()
    lorakit.attach(model, ["embed_tokens", "q_proj"], rank=4)
    train_a_little(model)
    expected = model(TOKENS).logits.detach()
    lorakit.save(model, tmp_path)
    torch.testing.assert_close(load_in_peft(models.llama(), tmp_path)(TOKENS).logits, expected)


class Fused(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.qkv = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)


@pytest.mark.parametrize(
    ("arguments", "rank", "alpha"),
    [
        (dict(r=2, enable_lora=[True, False, True]), 4, 10),
        (dict(r=2, enable_lora=[False, True, True]), 4, 10),
        (dict(r=2, enable_lora=[True, True, True]), 6, 15),
        (dict(r=[2, 0, 3], splits=[7, 2, 3]), 5, 5 / 3 * 5),
    ],
)
def test_merged_linear_in_peft_is_a_block_diagonal_pair(arguments, rank: int, alpha: float, tmp_path: Path) -> None:
    model = Fused(lorakit.MergedLinear(6, 12, lora_alpha=5, **arguments))
    train_a_little(model)
    plain = Fused(nn.Linear(6, 12))
    plain.load_state_dict({name: model.state_dict()[name] for name in ("qkv.weight", "qkv.bias")})
    x = torch.randn(3, 6)
    lorakit.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, pytest.approx(alpha))
    torch.testing.assert_close(load_in_peft(plain, tmp_path)(x), model(x))


def test_the_files_byte_for_byte(tmp_path: Path) -> None:
    """Fixed here, so that a change of the format is a decision and not an accident."""
    model = nn.ModuleDict({"q": nn.Linear(3, 2), "v": nn.Linear(3, 2)})
    lorakit.attach(model, ["q", "v"], rank=1, alpha=2)
    with torch.no_grad():
        for value, name in enumerate(("q", "v")):
            model[name].lora_A.fill_(value)
            model[name].lora_B.fill_(value + 0.5)
    lorakit.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": 1,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "target_modules": ["q", "v"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()} == {
        "base_model.model.q.lora_A.weight": ("F32", [1, 3]),
        "base_model.model.q.lora_B.weight": ("F32", [2, 1]),
        "base_model.model.v.lora_A.weight": ("F32", [1, 3]),
        "base_model.model.v.lora_B.weight": ("F32", [2, 1]),
    }
    lorakit.save(model, tmp_path / "again")
    assert _digest(tmp_path / "again" / "adapter_model.safetensors") == hashlib.sha256(data).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(tmp_path: Path) -> Path:
    model = models.llama()
    lorakit.attach(model, "q_proj", rank=4)
    train_a_little(model)
    lorakit.save(model, tmp_path)
    return tmp_path


def test_problem_03_keys_without_a_home_and_modules_without_a_key_are_errors(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = str(models.gpt2())
    other = models.gpt2()
    with pytest.raises(ValueError, match="does not fit GPT2LMHeadModel(.|\n)*q_proj: the model has no such module"):
        lorakit.load(other, folder)
    with pytest.raises(ValueError, match="nothing in the adapter fits"):
        lorakit.load(other, folder, force=True)
    assert str(other) == before

    smaller = models.llama()
    smaller.model.layers[0].self_attn.q_proj = nn.Linear(32, 24, bias=False)
    with pytest.raises(
        ValueError, match=r"A and B are \(4, 32\) and \(32, 4\), the layer needs \(4, 32\) and \(24, 4\)"
    ):
        lorakit.load(smaller, folder)
    wider = models.llama(hidden_size=64)  # a wrong model is told by one line for all layers of a kind
    with pytest.raises(ValueError, match=r"does not fit .*\n.*\*\.self_attn\.q_proj: A and B are .* \(×2\)$"):
        lorakit.load(wider, folder)
    lorakit.load(smaller, folder, force=True)
    assert smaller.model.layers[1].self_attn.q_proj.has_update

    more = models.llama()
    lorakit.attach(more, ["q_proj", "v_proj"], rank=4)
    with pytest.raises(ValueError, match="v_proj: adapted in the model, missing in the adapter"):
        lorakit.load(more, folder)

    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    extra = {**tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.ones(2)}
    safetensors.torch.save_file(extra, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"keys that no LoRA layer of lorakit has:\n  .*lora_C.weight"):
        lorakit.load(models.llama(), folder)
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.lora_\*"):
        lorakit.load(models.llama(), folder)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such adapter folder"):
        lorakit.load(models.llama(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no adapter folder: it has no adapter_config.json"):
        lorakit.load(models.llama(), tmp_path)
    folder = saved(tmp_path / "adapter")
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a complete safetensors file"):
        lorakit.load(models.llama(), folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA",\n')
    with pytest.raises(ValueError, match="adapter_config.json:2: not JSON"):
        lorakit.load(models.llama(), folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(ValueError, match="peft_type is 'PREFIX_TUNING'"):
        lorakit.load(models.llama(), folder)


def test_problem_25_and_50_empty_and_non_finite_tensors_are_not_saved(tmp_path: Path) -> None:
    model = models.llama()
    lorakit.attach(model, "q_proj")
    layer = model.model.layers[0].self_attn.q_proj
    good = layer.lora_A.data
    layer.lora_A.data = torch.full_like(good, float("nan"))
    with pytest.raises(ValueError, match="q_proj.lora_A.weight holds NaN"):
        lorakit.save(model, tmp_path / "adapter")
    layer.lora_A.data = good[:0]
    with pytest.raises(ValueError, match="q_proj.lora_A.weight is empty"):
        lorakit.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_saving_overwrites_its_own_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder = saved(tmp_path)
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]


def test_problem_33_saving_and_loading_ask_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    lorakit.load(models.llama(), saved(tmp_path))


def test_saved_merged_is_saved_unmerged(tmp_path: Path) -> None:
    model = models.llama()
    lorakit.attach(model, "q_proj")
    train_a_little(model)
    lorakit.save(model, tmp_path / "a")
    lorakit.merge(model)
    lorakit.save(model, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert _digest(tmp_path / "a" / name) == _digest(tmp_path / "b" / name)


def test_loralib_convolutions_and_partial_dora_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(lorakit.Conv2d(3, 4, 3, r=2))
    with pytest.raises(ValueError, match="another rank than PEFT's"):
        lorakit.save(model, tmp_path)
    mixed = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    lorakit.attach(mixed, "a", dora=True)
    lorakit.attach(mixed, "b")
    with pytest.raises(ValueError, match="DoRA for all modules or for none"):
        lorakit.save(mixed, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_head_trained_whole_travels_with_the_adapter(tmp_path: Path) -> None:
    model = models.bert()
    lorakit.attach(model, "query", also_train=["classifier"])
    train_a_little(model)
    lorakit.save(model, tmp_path)
    other = models.bert()
    nn.init.normal_(other.classifier.weight)  # a new head is random after loading the base (problem 32)
    lorakit.load(other, tmp_path)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    assert other.classifier.weight.requires_grad


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_problem_37_memory_is_flat_over_a_thousand_rounds_of_load_and_detach(tmp_path: Path) -> None:
    """safetensors' load_file alone would leave four megabytes behind."""
    model = nn.ModuleDict({f"layer{i}": nn.Linear(8, 8) for i in range(30)})
    lorakit.attach(model, "layer*", rank=2)
    lorakit.save(model, tmp_path)
    lorakit.detach(model)

    def resident(rounds: int) -> int:
        for _ in range(rounds):
            lorakit.load(model, tmp_path)
            lorakit.detach(model)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident(100)
    assert resident(1000) - before < 1_000_000


def test_problem_28_loading_another_adapter_compiles_nothing_again(tmp_path: Path) -> None:
    """Adapters of the same shapes take the places of one another; the first other scale costs one compilation."""
    from torch._dynamo.testing import CompileCounter

    def adapter(number: int, alpha: float) -> tuple[nn.Module, Path]:
        model = models.llama()
        lorakit.attach(model, ["q_proj", "up_proj"], rank=2, alpha=alpha)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in lorakit.parameters(model):
                parameter.add_(0.1 * torch.randn_like(parameter))
        lorakit.save(model, tmp_path / str(number), force=True)
        return model.eval(), tmp_path / str(number)

    torch.compiler.reset()
    model, _ = adapter(0, 4)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts, last = [], None
    with torch.no_grad():
        compiled(TOKENS)
        for number, alpha in enumerate((4, 4, 8, 6, 1.5), start=1):
            other, folder = adapter(number, alpha)
            lorakit.load(model, folder)
            logits = compiled(TOKENS).logits
            torch.testing.assert_close(logits, other(TOKENS).logits)
            assert last is None or (logits - last).abs().max() > 1e-3
            last = logits
            counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 2]
