"""Modules of Hugging Face transformers: one file per family."""

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.transformers_families.conv1d import Conv1DMLP
from torch_rsst.discovery.transformers_families.experts import StackedExperts
from torch_rsst.discovery.transformers_families.intermediate_output import IntermediateOutput
from torch_rsst.discovery.transformers_families.latent_heads import LatentHeads
from torch_rsst.discovery.transformers_families.separate_heads import SeparateHeads
from torch_rsst.discovery.transformers_families.state_spaces import StateSpace

register(Conv1DMLP())
register(IntermediateOutput())
register(StackedExperts())
register(LatentHeads())
register(StateSpace())
register(SeparateHeads())
