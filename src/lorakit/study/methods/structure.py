"""Find a transformer's blocks, their sublayers and its new head by structure, not by the model's name.

    stack       the nn.ModuleList in which every member holds an attention (a module whose class is called …Attention…)
    attention   the outermost such module of a block; more than one (cross-attention) is an error
    ends        the last linear layer of the attention, and the last one of the block outside it: they write to the
                residual stream. Experts, and outputs that are not as wide as the model, are errors
    norms       modules of the block called …Norm… whose weight is as wide as the model
    head        the modules beside a transformers model's base, except a language head

"Last" is in the order of definition. In BERT, RoBERTa, DeBERTa, MPNet, GPT-2, Llama and similar models this is the
order in which the layers run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ...core.errors import LoraError
from ...core.layers import is_transposed
from ...core.targets import closest, matching


@dataclass(frozen=True)
class Block:
    """One transformer block. width: the model's d_model."""

    name: str
    module: nn.Module
    width: int

    def __str__(self) -> str:
        return f"{self.name!r} ({type(self.module).__name__})"


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks from first to last. Raises ValueError that names what was not found."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_attentions, module)):
            stacks[name] = module
    if len(stacks) != 1:
        found = f"{len(stacks)}: {', '.join(map(repr, stacks))}" if stacks else "none"
        raise LoraError(
            f"{type(model).__name__} has no single stack of transformer blocks: expected one nn.ModuleList whose "
            f"members each hold an attention, found {found}."
        )
    ((name, stack),) = stacks.items()
    linears = _linears(stack)
    width = getattr(getattr(model, "config", None), "hidden_size", None) or (_outputs(linears[-1][1]) if linears else 0)
    return [Block(f"{name}.{index}", module, width) for index, module in enumerate(stack)]


def positions_of(model: nn.Module) -> int | None:
    """The number of tokens for which the model has learnt positions; None if it computes positions (rotary, relative).

    If the embedding of positions has a padding index, positions begin after it (RoBERTa, MPNet).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def attention_of(block: Block) -> nn.Module:
    found = _attentions(block.module)
    if len(found) != 1:
        kinds = ", ".join(type(attention).__name__ for attention in found)
        raise LoraError(f"{block} holds more than one attention: {kinds}. Only self-attention is expected.")
    return found[0]


def ends_of(block: Block) -> tuple[nn.Module, nn.Module]:
    """The output projections of the attention and of the MLP.

    An nn.MultiheadAttention never calls its own projection, so the module itself is given. Raises ValueError that says
    what was not found.
    """
    attention = attention_of(block)
    own = set(attention.modules())
    outside = [module for module in block.module.modules() if module not in own]
    if any(_is_experts(module) for module in outside):
        raise LoraError(f"{block} has an MLP of experts, so no single layer is its output projection.")
    linears = [module for _, module in _linears(block.module)]
    ends = []
    for what, inside in (("attention", own), ("MLP", set(outside))):
        found = [module for module in linears if module in inside]
        if what == "attention" and isinstance(attention, nn.MultiheadAttention):
            found = [attention]
        if not found:
            raise LoraError(f"{block}: no linear layer found that is the output projection of the {what}.")
        if _outputs(found[-1]) != block.width:
            raise LoraError(
                f"{block}: the last linear layer of the {what} has {_outputs(found[-1])} outputs, not the model's "
                f"{block.width}, so it is not the output projection that was looked for."
            )
        ends.append(found[-1])
    return ends[0], ends[1]


def norms_of(block: Block) -> dict[str, nn.Module]:
    """The block's norms over the residual stream, by name within the block. Norms of attention heads are left out."""
    return {
        name: module
        for name, module in block.module.named_modules()
        if _is_norm(module) and module.get_parameter("weight").numel() == block.width
    }


def norm_after_mlp(block: Block) -> nn.Module | None:
    """The norm that ends a post-norm block: the one that shares a submodule with the MLP's output projection.

    None if there is none (GPT-2, Llama), or if all layers are direct children of the block, so that structure does not
    show which norm comes when.
    """
    _, end = ends_of(block)
    for parent in block.module.modules():
        if parent is not block.module and end in parent.children():
            norms = [module for module in parent.children() if _is_norm(module)]
            return norms[0] if len(norms) == 1 else None
    return None


def query_and_value(block: Block) -> tuple[list[str], bool]:
    """The names of the layers that give q and v, and whether a single layer gives q, k and v together."""
    own = set(attention_of(block).modules())
    layers = [(name, module) for name, module in _linears(block.module) if module in own]
    inputs = dict(layers[:-1])  # the last is the output projection
    if len(inputs) == 1:
        ((name, module),) = inputs.items()
        if _outputs(module) == 3 * block.width:
            return [f"{block.name}.{name}"], True
    found = [[name for name in inputs if name.rpartition(".")[2].lower().startswith(letter)] for letter in ("q", "v")]
    if [len(names) for names in found] != [1, 1]:
        raise LoraError(
            f"{block}: expected one layer for the query and one for the value, "
            f"or one three times as wide as the model; found {', '.join(map(repr, inputs)) or 'none'}. "
            f"Name the layers in targets."
        )
    return [f"{block.name}.{name}" for (name,) in found], False


def head_of(model: nn.Module, head: str | Iterable[str] | None) -> list[str]:
    """The names of the modules that are a new head. head: their names; None finds that of a transformers model.

    Empty for a language model, whose head is pretrained, and for a model without a separate base model.
    """
    if head is not None:
        names = [name for name, _ in model.named_modules() if name]
        chosen: list[str] = []
        for pattern in [head] if isinstance(head, str) else head:
            hits = matching(pattern, names)
            if not hits:
                raise LoraError(f"head={pattern!r} matches no module. {closest(pattern, names)}".rstrip())
            chosen += hits
        return chosen
    base = base_model_of(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if base is model or output is not None:
        return []
    return [
        name for name, module in model.named_children() if module is not base and any(True for _ in module.parameters())
    ]


def base_model_of(model: nn.Module) -> nn.Module:
    """The base model of a transformers model, without the head; any other model is returned itself."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return base if isinstance(base, nn.Module) else model


def _attentions(module: nn.Module) -> list[nn.Module]:
    """The outermost modules inside `module` whose class name says that they are an attention."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if "attention" in type(child).__name__.lower() else _attentions(child)
    return found


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear) or is_transposed(type(m))]


def _outputs(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    return int(module.get_parameter("weight").shape[1 if is_transposed(type(module)) else 0])


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and module._parameters.get("weight") is not None


def _is_experts(module: nn.Module) -> bool:
    """Whether a module is the stacked matrices of experts, or a list with several modules of one class."""
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    alike = isinstance(module, nn.ModuleList) and len(module) > len({type(member) for member in module})
    return stacked or alike
