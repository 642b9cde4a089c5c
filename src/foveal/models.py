"""Transformers of diffusers by the same names, whose `from_pretrained` brings back sparse layers.

    from foveal.models import WanTransformer3DModel
    transformer = WanTransformer3DModel.from_pretrained("folder")

diffusers finds the classes here when a pipeline is loaded, if foveal was imported before. They are made when they are
asked for, so that `import foveal` needs no diffusers.
"""

from foveal.integrations.pretrained import model_class as __getattr__  # noqa: F401
