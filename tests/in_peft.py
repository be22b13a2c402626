"""Adapters loaded by PEFT itself."""

import warnings
from pathlib import Path

import peft
from torch import nn


def load_in_peft(base: nn.Module, folder: Path, ignored: str | None = None) -> nn.Module:
    """PEFT's own loading. A warning (missing keys, unknown fields) is an error, except that of a deprecated name.

    ignored: the beginning of a warning that does not concern the folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        if ignored is not None:
            warnings.filterwarnings("ignore", ignored)
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()
