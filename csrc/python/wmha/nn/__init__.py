"""Modules around the operators: attention with its projections, a transformer's layer and a stack of layers.

They have the names, options, defaults and parameter names of the C++ modules in ``wmha::nn`` (``wmha/nn.h``), and with the
same seed the same initial parameters. They can be scripted, compiled and exported. Parameters move in both directions:

    stack.load_state_dict(torch.jit.load("from_cpp.pt").state_dict())  # written in C++ by torch::save(stack, "from_cpp.pt")
    torch.jit.script(stack).save("for_cpp.pt")  # read in C++ by torch::load(stack, "for_cpp.pt")

Either side makes a module with the same options first. torch::load takes tensors as they are: it needs the same dtype, and
doesn't compare shapes.

Inputs are (batch, positions, embedding). Invalid options raise ValueError at construction, with the name of the option,
what was expected and what came.
"""

from .multihead_attention import KeyValueCache, MultiheadAttention
from .transformer import TransformerLayer, TransformerStack

__all__ = ["KeyValueCache", "MultiheadAttention", "TransformerLayer", "TransformerStack"]
