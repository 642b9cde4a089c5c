"""Sparse attention inside models and pipelines: one call to put it in, one to take it out, one file to keep it.

Transformers of diffusers stand here too, by the same names; their `from_pretrained` brings back sparse layers:

    from foveal.models import WanTransformer3DModel
    transformer = WanTransformer3DModel.from_pretrained("folder")

diffusers finds the classes here when a pipeline is loaded, if foveal was imported before. They are made when they are
asked for, so that `import foveal` needs no diffusers.
"""

from foveal.models.context_parallel import context_parallel_attention
from foveal.models.convert import dense, densify, sparsify
from foveal.models.files.checkpoints import export_checkpoint, load_checkpoint
from foveal.models.files.persist import load, save
from foveal.models.parameters import quantizable, sparse_parameters, unfreeze
from foveal.models.policy import Policy, get_policy, set_policy
from foveal.models.pretrained import model_class as __getattr__  # noqa: F401
from foveal.models.reconfigure import reconfigure
from foveal.models.report import summary
from foveal.models.shipped import tiny

__all__ = [
    "Policy",
    "context_parallel_attention",
    "dense",
    "densify",
    "export_checkpoint",
    "get_policy",
    "load",
    "load_checkpoint",
    "quantizable",
    "reconfigure",
    "save",
    "set_policy",
    "sparse_parameters",
    "sparsify",
    "summary",
    "tiny",
    "unfreeze",
]
