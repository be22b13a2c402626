"""Stacks of experts in PEFT's files. PEFT up to 0.18.1 treated every stack as (experts, in, out)."""

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
from folders import CONFIG, TENSORS
from in_peft import load_in_peft
from models import train_a_little


class Experts(nn.Module):
    """transformers' two stacks: up (experts, 2·inner, width), down (experts, width, inner), or each transposed."""

    def __init__(self, width: int, inner: int, stored: str) -> None:
        super().__init__()
        up, down = (3, 2 * inner, width), (3, width, inner)
        self.transposed = stored != "out-in"
        if self.transposed:
            up, down = (3, width, 2 * inner), (3, inner, width)
        if stored != "in-out":  # the word that PEFT goes by; Llama 4's experts lack it
            self.is_transposed = self.transposed
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (w.mT if self.transposed else w for w in (self.gate_up_proj, self.down_proj))
        return torch.relu(x @ up.mT)[..., : down.shape[-1]] @ down.mT


def make(width: int, inner: int, stored: str = "out-in") -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": Experts(width, inner, stored)})


def saved(tmp_path: Path, targets: list[str], version: str | None, by_peft: bool, turn: bool, *shape) -> torch.Tensor:
    """Write an adapter in today's layout or in PEFT's old one; return the outputs."""
    model = make(*shape)
    lorakit.attach(model, targets, rank=2, alpha=3)
    train_a_little(model)
    lorakit.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config.pop("peft_version") == "0.19.1"  # the first with this layout
    config |= ({"auto_mapping": None} if by_peft else {}) | ({"peft_version": version} if version else {})
    (tmp_path / CONFIG).write_text(json.dumps(config))
    if turn:
        # The old layout: A (experts·r, out) has B's columns, expert by expert, and B (in, r·experts) has A's rows.
        tensors = safetensors.torch.load_file(tmp_path / TENSORS)
        for path in {key.partition(".lora_")[0] for key in tensors}:
            A, B = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
            by_expert = [(A[2 * e : 2 * e + 2], B[:, e::3]) for e in range(3)]
            tensors[f"{path}.lora_A.weight"] = torch.cat([b.T for _, b in by_expert])
            tensors[f"{path}.lora_B.weight"] = torch.stack([a.T for a, _ in by_expert], -1).flatten(1).contiguous()
        safetensors.torch.save_file(tensors, tmp_path / TENSORS)
    return model["experts"](torch.ones(2, shape[0])).detach()


STORED = ["out-in", "in-out", "is_transposed"]
VERSIONS = {"old": "0.18.1", "new": "0.19.1"}


def by_hand(path: Path, targets: list[str], era: str, width: int, inner: int, stored: str) -> nn.ModuleDict:
    """A file as PEFT of that time makes it for the stacks, of random numbers; returns the model with W + 1.5·ΔW in
    float64. PEFT ≤ 0.18.1 called a stack (experts, in, out), as does any PEFT where the module is_transposed, and made
    A (experts·r, in), B (out, r·experts) for x @ (W + s·(B A)ᵀ); PEFT ≥ 0.19.1 calls the others (experts, out, in)."""
    model = make(width, inner, stored).double()
    tensors: dict[str, torch.Tensor] = {}
    for depth, target in enumerate(targets[::-1]):  # the first parameter is the innermost
        weight = getattr(model["experts"], target)
        called_in_out = era == "old" or stored == "is_transposed"
        inputs, outputs = weight.shape[1:] if called_in_out else weight.shape[:0:-1]
        A, B = torch.randn(3 * 2, inputs), torch.randn(outputs, 2 * 3)
        where = f"base_model.model.experts{'.base_layer' * depth}"
        tensors |= {f"{where}.lora_A.weight": A, f"{where}.lora_B.weight": B}
        with torch.no_grad():
            for expert in range(3):
                delta = B[:, expert::3].double() @ A[2 * expert : 2 * expert + 2].double()  # (outputs, inputs)
                weight[expert] += 1.5 * (delta.T if called_in_out else delta)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": [], "auto_mapping": None,
        "target_parameters": [f"experts.{target}" for target in targets], "peft_version": VERSIONS[era],
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, path / TENSORS)
    return model


BOTH = ["gate_up_proj", "down_proj"]
X = {5: torch.ones(2, 5), 6: torch.ones(2, 6)}


@pytest.mark.parametrize("targets", [BOTH, ["down_proj"]])
@pytest.mark.parametrize("shape", [(5, 6), (6, 6)])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("era", VERSIONS)
def test_problem_29_files_of_both_layouts_are_the_same_function(
    era: str, stored: str, shape: tuple[int, int], targets: list[str], tmp_path: Path
) -> None:
    expected = by_hand(tmp_path / era, targets, era, *shape, stored)
    model = make(*shape, stored).double()
    lorakit.load(model, tmp_path / era, dtype=torch.float64)
    lorakit.merge(model)
    for target in BOTH:
        found, wanted = (getattr(own["experts"], target) for own in (model, expected))
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    # And in the layout of either time again: the same bytes as PEFT has.
    lorakit.unmerge(model)
    for other in VERSIONS:
        lorakit.save(model.float(), tmp_path / "again", format="peft" if other == "new" else "peft-0.18")
        config = json.loads((tmp_path / "again" / CONFIG).read_text())
        assert config["peft_version"] == VERSIONS[other]
        again = make(*shape, stored).double()
        lorakit.load(again, tmp_path / "again", dtype=torch.float64)
        lorakit.merge(again)
        for target in BOTH:
            torch.testing.assert_close(getattr(again["experts"], target), getattr(expected["experts"], target))
        if other == era:
            ours, theirs = (safetensors.torch.load_file(tmp_path / name / TENSORS) for name in ("again", era))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())


@pytest.mark.parametrize("shape", [(5, 6), (6, 6)])
@pytest.mark.parametrize("stored", STORED)
def test_problem_29_peft_of_today_reads_every_stored_order(stored: str, shape: tuple[int, int], tmp_path: Path) -> None:
    model = Wrapped(*shape, stored)
    lorakit.attach(model, BOTH, rank=2)
    train_a_little(model)
    lorakit.save(model, tmp_path)
    theirs = load_in_peft(Wrapped(*shape, stored), tmp_path)
    torch.testing.assert_close(theirs(X[shape[0]]), model(X[shape[0]]))


@pytest.mark.parametrize("era", VERSIONS)
def test_what_was_read_without_its_model_goes_on_only_where_it_is_known(era: str, tmp_path: Path) -> None:
    by_hand(tmp_path / "file", BOTH, era, 5, 6, "in-out")
    adapter = lorakit.Adapter.load(tmp_path / "file")
    assert {update.layout.stored for update in adapter.updates.values()} == {"" if era == "new" else "?"}  # type: ignore[attr-defined]
    with pytest.raises(lorakit.LoraError, match="does not tell W from Wᵀ: read it with lorakit.load"):
        lorakit.insert(make(5, 6, "in-out"), adapter)
    model = make(5, 6)
    lorakit.attach(model, BOTH, rank=2)
    if era == "old":
        with pytest.raises(lorakit.LoraError, match="does not tell W from Wᵀ: read it with lorakit.load"):
            lorakit.insert(model, adapter)
        with pytest.raises(lorakit.LoraError, match="experts.gate_up_proj: this adapter was read without its model"):
            adapter.save(tmp_path / "again")
    else:
        adapter.save(tmp_path / "again")
        ours, theirs = (safetensors.torch.load_file(tmp_path / name / TENSORS) for name in ("again", "file"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(lorakit.LoraError, match="experts.gate_up_proj: this adapter was read without its model"):
        adapter.save(tmp_path / "again", format="peft-0.18")


def test_square_stacks_without_a_version_are_said(tmp_path: Path) -> None:
    expected = saved(tmp_path, ["down_proj"], None, False, False, 6, 6)
    with pytest.warns(UserWarning, match="the matrices of experts.down_proj are square and no peft_version says how"):
        assert torch.equal(outputs(tmp_path, 6, 6), expected)


def outputs(tmp_path: Path, *shape) -> torch.Tensor:
    model = make(*shape)
    lorakit.load(model, tmp_path)
    return model["experts"](X[shape[0]]).detach()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.0", "0.18.2.dev0", "0.19.0", "0.19.1", "0.21.2", "strange"])
def test_shapes_tell_the_layout_whatever_the_version(version: str | None, turn: bool, tmp_path: Path) -> None:
    expected = saved(tmp_path, BOTH, version, True, turn, 5, 6)
    torch.testing.assert_close(outputs(tmp_path, 5, 6), expected)


@pytest.mark.parametrize("stored", ["out-in", "in-out"])
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.2"])
def test_a_square_stack_is_as_the_others_of_its_file(version: str, turn: bool, stored: str, tmp_path: Path) -> None:
    """inner = width: down is square, up is not."""
    expected = saved(tmp_path, BOTH, version, version is not None, turn, 6, 6, stored)
    torch.testing.assert_close(outputs(tmp_path, 6, 6, stored), expected)


@pytest.mark.parametrize(
    ("version", "by_peft", "turn"),
    [
        ("0.17.1", True, True),
        ("0.18.0", True, True),
        ("0.18.1", True, True),
        ("0.18.1.dev0", True, True),
        (None, True, True),  # PEFT names its version since 0.18
        ("0.19.1", True, False),
        ("0.19.2.dev0@abc", True, False),
        ("0.20.0", True, False),
        ("1.0.0", True, False),
    ],
)
def test_of_square_stacks_alone_the_version_tells(version, by_peft: bool, turn: bool, tmp_path: Path) -> None:
    expected = saved(tmp_path, ["down_proj"], version, by_peft, turn, 6, 6)
    torch.testing.assert_close(outputs(tmp_path, 6, 6), expected)


@pytest.mark.parametrize("version", ["0.18.2", "0.18.2.dev0", "0.19.0", "0.19.0.dev0", "unknown"])
def test_where_nothing_tells_it_is_refused(version: str, tmp_path: Path) -> None:
    saved(tmp_path, ["down_proj"], version, True, False, 6, 6)
    model = make(6, 6)
    with pytest.raises(ValueError, match=f"experts.down_proj: its matrices are square, and PEFT {version} is of the"):
        lorakit.load(model, tmp_path)
    assert torch.equal(model["experts"](X[6]), make(6, 6)["experts"](X[6]))


@pytest.mark.parametrize("version", ["0.18.0", "0.19.0", "0.21.2"])
@pytest.mark.parametrize("shape", [(5, 6), (6, 6)])
def test_what_is_stored_transposed_was_never_turned(version: str, shape: tuple[int, int], tmp_path: Path) -> None:
    expected = saved(tmp_path, BOTH, version, True, False, *shape, "is_transposed")
    torch.testing.assert_close(outputs(tmp_path, *shape, "is_transposed"), expected)


def test_a_stack_that_fits_neither_way_is_a_misfit(tmp_path: Path) -> None:
    saved(tmp_path, BOTH, "0.18.0", True, True, 5, 6)
    with pytest.raises(ValueError, match=r"the layer needs \(3, 2, 6\) and \(3, 14, 2\)"):
        lorakit.load(make(6, 7), tmp_path)


def test_what_peft_makes_today_is_read_as_it_computes_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["down_proj"], init_lora_weights=False)
        theirs = peft.get_peft_model(Wrapped(), config).eval()
        theirs.save_pretrained(str(tmp_path))
    model = Wrapped()
    lorakit.load(model, tmp_path)
    torch.testing.assert_close(model(X[6]), theirs(X[6]))


class Wrapped(nn.Module):
    def __init__(self, width: int = 6, inner: int = 6, stored: str = "out-in") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(width, inner, stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


@pytest.mark.parametrize("layout", ["peft", "peft-0.18", "per-expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_read_runs_in_the_grouped_product(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers' default for experts, whose kernels refuse the strides that a file's order of dimensions leaves."""
    ids = torch.arange(24).view(2, 12)
    model = models.qwen_moe().to(dtype)
    lorakit.attach(model, "all-linear+experts", rank=4)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in lorakit.parameters(model):
            parameter.copy_(torch.randn_like(parameter) / 8)
    how = {"experts": "per-expert"} if layout == "per-expert" else {"format": layout}
    lorakit.save(model, tmp_path, force=True, **how)
    again = models.qwen_moe().to(dtype)
    lorakit.load(again, tmp_path)
    assert all(parameter.is_contiguous() for parameter in lorakit.parameters(again))
    expected = model(ids).logits
    torch.testing.assert_close(again(ids).logits, expected, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 5e-2)
    again(ids).logits.sum().backward()
