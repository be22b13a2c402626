"""Adapters loaded by PEFT itself."""

import warnings
from pathlib import Path

import peft
from torch import nn


def load_in_peft(base: nn.Module, folder: Path, ignored: str | None = None) -> nn.Module:
    """PEFT's own loading; a warning (missing keys, unknown fields) is an error, its use of a deprecated name is not.

    ignored: the beginning of a warning that says nothing wrong about the folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        if ignored is not None:
            warnings.filterwarnings("ignore", ignored)
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()
