"""B'MOJO as a Hugging Face model; importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from memtier.models.bmojo.configuration_bmojo import BMojoConfig
from memtier.models.bmojo.modeling_bmojo import BMojoForCausalLM, BMojoModel, BMojoOutput

__all__ = ["BMojoConfig", "BMojoForCausalLM", "BMojoModel", "BMojoOutput"]

AutoConfig.register(BMojoConfig.model_type, BMojoConfig, exist_ok=True)
AutoModelForCausalLM.register(BMojoConfig, BMojoForCausalLM, exist_ok=True)
