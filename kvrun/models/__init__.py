"""Models: config.json -> ModelSpec -> Plan, and the names of their tensors."""

from kvrun.models.decoder import build_plan
from kvrun.models.load import load_spec
from kvrun.models.spec import LayerSpec, ModelSpec, RopeSpec, TensorRef
from kvrun.models.tensors import check_tensors, tensor_refs

__all__ = ["LayerSpec", "ModelSpec", "RopeSpec", "TensorRef", "build_plan", "check_tensors", "load_spec", "tensor_refs"]
