"""Where a transformer's blocks, their sublayers and its new head are, found by structure and not by the model's name.

    stack       the nn.ModuleList whose every member holds an attention (a module whose class is called …Attention…)
    attention   the outermost such module of a block; more than one (cross-attention) is refused
    projections the last linear layer of the attention, and the last one of the block outside it: what each sublayer
                writes to the residual stream. Their outputs must be as wide as the model, or it is refused
    norms       modules of the block called …Norm… whose weight is as wide as the model
    head        what lies beside a transformers model's base and is no language head

"Last" is in the order of definition, which in BERT, RoBERTa, DeBERTa, MPNet, GPT-2, Llama and their kin is the order
in which the layers run. A block of experts has no single such layer, and is refused by its width or runs them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..core.targets import closest, is_transposed, matching


@dataclass(frozen=True)
class Block:
    """One transformer block: its name, itself, and what its two sublayers end in."""

    name: str
    module: nn.Module
    attention: nn.Module
    attention_output: nn.Module  # the output projection; an nn.MultiheadAttention itself, which never calls its own
    mlp_output: nn.Module
    width: int  # d_model


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks from the first to the last. Raises ValueError that names what was not found."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_attentions, module)):
            stacks[name] = module
    if len(stacks) != 1:
        found = f"{len(stacks)}: {', '.join(map(repr, stacks))}" if stacks else "none"
        raise ValueError(
            f"{type(model).__name__} has no single stack of transformer blocks: expected one nn.ModuleList whose "
            f"members each hold an attention, found {found}."
        )
    ((name, stack),) = stacks.items()
    return [_block(f"{name}.{index}", module, model) for index, module in enumerate(stack)]


def norms_of(block: Block) -> dict[str, nn.Module]:
    """The block's norms over the residual stream, by name within the block: not those of an attention's heads."""
    return {
        name: module
        for name, module in block.module.named_modules()
        if _is_norm(module) and module.get_parameter("weight").numel() == block.width
    }


def norm_after_mlp(block: Block) -> nn.Module | None:
    """The norm that ends a post-norm block: the one beside the MLP's output projection, in a module of their own.

    None where there is none (GPT-2, Llama), and where all layers lie side by side in the block, so that structure does
    not tell which norm comes when.
    """
    for parent in block.module.modules():
        if parent is not block.module and block.mlp_output in parent.children():
            norms = [module for module in parent.children() if _is_norm(module)]
            return norms[0] if len(norms) == 1 else None
    return None


def query_and_value(block: Block) -> tuple[list[str], bool]:
    """The names of the layers that give q and v, and whether it is one layer that gives q, k and v side by side."""
    inputs = {
        name: module
        for name, module in _linears(block.module)
        if module is not block.attention_output and module in set(block.attention.modules())
    }
    if len(inputs) == 1:
        ((name, module),) = inputs.items()
        if _outputs(module) == 3 * block.width:
            return [f"{block.name}.{name}"], True
    found = [[name for name in inputs if name.rpartition(".")[2].lower().startswith(letter)] for letter in ("q", "v")]
    if [len(names) for names in found] != [1, 1]:
        raise ValueError(
            f"{block.name!r} ({type(block.module).__name__}): expected one layer for the query and one for the value, "
            f"or one three times as wide as the model; found {', '.join(map(repr, inputs)) or 'none'}. "
            f"Name the layers in targets."
        )
    return [f"{block.name}.{name}" for (name,) in found], False


def head_of(model: nn.Module, head: str | Iterable[str] | None) -> list[str]:
    """The names of the modules that are a new head. head: their names; None finds a transformers model's.

    Empty for a language model, whose head was trained with it, and for a model without a base beside which a head lies.
    """
    if head is not None:
        names = [name for name, _ in model.named_modules() if name]
        chosen: list[str] = []
        for pattern in [head] if isinstance(head, str) else head:
            hits = matching(pattern, names)
            if not hits:
                raise ValueError(f"head={pattern!r} matches no module. {closest(pattern, names)}".rstrip())
            chosen += hits
        return chosen
    base = base_of(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if base is model or output is not None:
        return []
    return [
        name for name, module in model.named_children() if module is not base and any(True for _ in module.parameters())
    ]


def base_of(model: nn.Module) -> nn.Module:
    """A transformers model's base model, without the head; any other model itself."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return base if isinstance(base, nn.Module) else model


def _block(name: str, module: nn.Module, model: nn.Module) -> Block:
    where = f"{name!r} ({type(module).__name__})"
    attentions = _attentions(module)
    if len(attentions) > 1:
        kinds = ", ".join(type(attention).__name__ for attention in attentions)
        raise ValueError(f"{where} holds more than one attention: {kinds}. Only self-attention is expected.")
    attention = attentions[0]
    own = set(attention.modules())
    linears = [linear for _, linear in _linears(module)]
    inside = [linear for linear in linears if linear in own]
    outside = [linear for linear in linears if linear not in own]
    if isinstance(attention, nn.MultiheadAttention):
        inside = [attention]
    for found, what in ((inside, "the attention"), (outside, "the MLP")):
        if not found:
            raise ValueError(f"{where}: no linear layer found as the output projection of {what}.")
    width = getattr(getattr(model, "config", None), "hidden_size", None) or _outputs(outside[-1])
    for found, what in ((inside, "attention"), (outside, "MLP")):
        if _outputs(found[-1]) != width:
            raise ValueError(
                f"{where}: the last linear layer of the {what} has {_outputs(found[-1])} outputs, not the model's "
                f"{width}, so it is not the output projection that was looked for."
            )
    return Block(name, module, attention, inside[-1], outside[-1], width)


def _attentions(module: nn.Module) -> list[nn.Module]:
    """The outermost modules inside this one that are an attention by their class's name."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if "attention" in type(child).__name__.lower() else _attentions(child)
    return found


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)]


def _outputs(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    return int(module.get_parameter("weight").shape[1 if is_transposed(module) else 0])


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and module._parameters.get("weight") is not None
