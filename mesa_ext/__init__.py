"""Mesa layer for PyTorch: locally optimal linear attention as compiled CPU and CUDA operators.

>>> from mesa_ext import mesa_attention, mesa_decode_step, MesaState
"""

from mesa_ext.attention import MesaState, SolverInfo, mesa_attention, mesa_decode_step

__all__ = ["MesaState", "SolverInfo", "mesa_attention", "mesa_decode_step"]
