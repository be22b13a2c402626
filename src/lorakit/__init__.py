"""LoRA for PyTorch: adapt any model in place, train, merge exactly, and save what every other program reads.

import lorakit

print(lorakit.attach(model, "all-linear", rank=16))
...                                   # train as before: only the adapter has gradients
lorakit.save(model, "my-adapter")     # PEFT's folder
"""

from importlib.metadata import version as _version

from .core.adapter import Adapter as Adapter
from .core.adapter import Update as Update
from .core.attach import Report as Report
from .core.attach import attach as attach
from .core.attach import detach as detach
from .core.attach import disabled as disabled
from .core.attach import merge as merge
from .core.attach import unmerge as unmerge
from .core.exchange import extract as extract
from .core.exchange import insert as insert
from .core.layers import Conv1d as Conv1d
from .core.layers import Conv2d as Conv2d
from .core.layers import Conv3d as Conv3d
from .core.layers import ConvLoRA as ConvLoRA
from .core.layers import Embedding as Embedding
from .core.layers import Linear as Linear
from .core.layers import LoRALayer as LoRALayer
from .core.layers import MergedLinear as MergedLinear
from .core.trainable import lora_state_dict as lora_state_dict
from .core.trainable import mark_only_lora_as_trainable as mark_only_lora_as_trainable
from .formats import load as load
from .formats import save as save

__version__ = _version("lorakit")
