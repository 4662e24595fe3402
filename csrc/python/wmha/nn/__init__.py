"""Modules around the operators: attention with its projections, a transformer's layer and a stack of layers.

They have the names, options, defaults and parameter names of the C++ modules in ``wmha::nn`` (``wmha/nn.h``), and with
the same seed the same initial parameters. They can be scripted, compiled and exported. Parameters move in both
directions:

    torch.jit.script(stack).save("python.pt")  # C++ reads it by torch::load(stack, "python.pt")
    stack.load_state_dict(torch.jit.load("cpp.pt").state_dict())  # what torch::save(stack, "cpp.pt") wrote in C++

Either side makes a module with the same options first; in C++ it must have the dtype of the file.

Inputs are (batch, positions, embedding). Invalid options raise ValueError at construction, with the name of the option,
what was expected and what came.
"""

from .multihead_attention import KeyValueCache, MultiheadAttention
from .transformer import TransformerLayer, TransformerStack

__all__ = ["KeyValueCache", "MultiheadAttention", "TransformerLayer", "TransformerStack"]
