"""The operators of ``csrc/``, registered with ``torch.library``, and the references they are held to.

Each operator has a schema, a reference in plain torch (the definition), a fake implementation, checks at the door,
a backward where it makes sense, and rows in ``csrc/kernels.def``: one compiled variant each, picked at run time by
what the CPU can do. A source tree without the compiled module ``updp._C`` works: the references then do the work.
"""

from updp.ops.attention import attention as attention
from updp.ops.attention import attention_packed as attention_packed
from updp.ops.attention import attention_parts as attention_parts
from updp.ops.attention import attention_reference as attention_reference
from updp.ops.attention import attention_variants as attention_variants
from updp.ops.conv import conv2d as conv2d
from updp.ops.conv import conv_reference as conv_reference
from updp.ops.conv import conv_variants as conv_variants
from updp.ops.conv import linear as linear
from updp.ops.conv import pack_conv as pack_conv
from updp.ops.depthwise import depthwise_compose as depthwise_compose
from updp.ops.depthwise import depthwise_compose_reference as depthwise_compose_reference
from updp.ops.form import ACTIVATIONS as ACTIVATIONS
from updp.ops.form import ConvForm as ConvForm
from updp.ops.layer_norm import layer_norm as layer_norm
from updp.ops.layer_norm import layer_norm_reference as layer_norm_reference
from updp.ops.layer_norm import layer_norm_variants as layer_norm_variants
from updp.ops.program import Line as Line
from updp.ops.program import conv_program as conv_program
from updp.ops.program import program_bytes as program_bytes
from updp.ops.rows import REFERENCE as REFERENCE
from updp.ops.rows import KernelRow as KernelRow
from updp.ops.rows import cpu_features as cpu_features
from updp.ops.rows import kernel_rows as kernel_rows
from updp.ops.rows import native_status as native_status
