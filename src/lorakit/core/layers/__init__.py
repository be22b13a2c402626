"""The kinds of adapted layers: a frozen weight and two thin factors beside it.

    Linear, MergedLinear, Embedding, Conv1d, Conv2d, Conv3d       loralib's names and constructor arguments

Each is a subclass of torch's own layer, so an existing `nn.Linear` becomes one by changing its class (`attach.py`), and
everything that worked on the module before works after. What they share, mainly merging, is in `adapted.py`.

Not here: choosing layers (`targets.py`), files (`lorakit.formats`).
"""

from ..lora_layer import LoRALayer as LoRALayer
from .blocks import MergedLinear as MergedLinear
from .blocks import block_sizes as block_sizes
from .conv import Conv1d as Conv1d
from .conv import Conv2d as Conv2d
from .conv import Conv3d as Conv3d
from .conv import ConvLoRA as ConvLoRA
from .embedding import Embedding as Embedding
from .linear import TRANSFORMERS_CONV1D as TRANSFORMERS_CONV1D
from .linear import Linear as Linear
from .linear import is_transposed as is_transposed
from .linear import linear_size as linear_size
from .linear import plain_matrix as plain_matrix
