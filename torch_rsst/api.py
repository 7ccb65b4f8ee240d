"""The public names: what ``torch_rsst.…`` gives. Importing it takes torch's second or two."""

from __future__ import annotations

from torch.nn.utils.prune import (
    BasePruningMethod,
    CustomFromMask,
    Identity,
    L1Unstructured,
    LnStructured,
    PruningContainer,
    RandomStructured,
    RandomUnstructured,
    _compute_norm,
    _compute_nparams_toprune,
    _validate_pruning_amount,
    _validate_pruning_amount_init,
    _validate_pruning_dim,
    _validate_structured_pruning,
    is_pruned,
)

import torch_rsst.discovery as discovery
import torch_rsst.importance as importance
import torch_rsst.schedules as schedules
from torch_rsst._version import __version__
from torch_rsst.compaction.budgets import Plan, plan
from torch_rsst.compaction.compaction import compact
from torch_rsst.discovery import find_groups
from torch_rsst.distillation import distillation_loss
from torch_rsst.groups.groups import Group, GroupLayer, Groups, Member, head_layer
from torch_rsst.importance.measuring import measure_importance
from torch_rsst.masking.checkpoints import load_dense_state_dict, prepare_from_state_dict
from torch_rsst.masking.dense_weights import dense_weights
from torch_rsst.masking.freezing import freeze_masked
from torch_rsst.masking.live_weight import _rebuild_masked_module
from torch_rsst.masking.mask_sets import apply_mask, extract_mask, penalty_mask, refresh
from torch_rsst.masking.masked_parameter import _rebuild_mask_hook
from torch_rsst.masking.optimizer_state import convert_optimizer_state
from torch_rsst.masking.removal import remove_all
from torch_rsst.penalty.regularizer import RegularizedPruner
from torch_rsst.reconstruction.reconstruction import reconstruct
from torch_rsst.regrouping.regrouping import regroup
from torch_rsst.report.explanation import Explanation, UnitDecision
from torch_rsst.report.sparsity import LayerReport, ParameterReport, SparsityReport, sparsity_report
from torch_rsst.rounds.averages import follow
from torch_rsst.rounds.refill import Refill
from torch_rsst.rounds.round import Round
from torch_rsst.rounds.rsst import RSST
from torch_rsst.saving.compact_folder import load_compact, save_compact
from torch_rsst.saving.info import CompactInfo, compact_info
from torch_rsst.stock.functional import fillback, global_unstructured, head_structured
from torch_rsst.stock.methods import Fillback, GlobalL1, HeadRegroup
from torch_rsst.stock.stock import (
    custom_from_mask,
    identity,
    l1_unstructured,
    ln_structured,
    random_structured,
    random_unstructured,
    remove,
)
from torch_rsst.utils.errors import (
    CompactionWarning,
    FractionalMaskWarning,
    InertPenaltyWarning,
    ReplicaWarning,
    RoundWarning,
    RSSTWarning,
    UnfrozenZerosWarning,
    UnsupportedModuleWarning,
)

__all__ = [
    "RSST",
    "BasePruningMethod",
    "CompactInfo",
    "CompactionWarning",
    "CustomFromMask",
    "Explanation",
    "Fillback",
    "FractionalMaskWarning",
    "GlobalL1",
    "Group",
    "GroupLayer",
    "Groups",
    "HeadRegroup",
    "Identity",
    "InertPenaltyWarning",
    "L1Unstructured",
    "LayerReport",
    "LnStructured",
    "Member",
    "ParameterReport",
    "Plan",
    "PruningContainer",
    "RSSTWarning",
    "RandomStructured",
    "RandomUnstructured",
    "Refill",
    "RegularizedPruner",
    "ReplicaWarning",
    "Round",
    "RoundWarning",
    "SparsityReport",
    "UnfrozenZerosWarning",
    "UnitDecision",
    "UnsupportedModuleWarning",
    "__version__",
    "apply_mask",
    "compact",
    "compact_info",
    "convert_optimizer_state",
    "custom_from_mask",
    "dense_weights",
    "discovery",
    "distillation_loss",
    "extract_mask",
    "fillback",
    "find_groups",
    "follow",
    "freeze_masked",
    "global_unstructured",
    "head_layer",
    "head_structured",
    "identity",
    "importance",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "load_compact",
    "load_dense_state_dict",
    "measure_importance",
    "penalty_mask",
    "plan",
    "prepare_from_state_dict",
    "random_structured",
    "random_unstructured",
    "reconstruct",
    "refresh",
    "regroup",
    "remove",
    "remove_all",
    "save_compact",
    "schedules",
    "sparsity_report",
]

# What pickles of masked models name: these paths stay when modules move.
_FROM_PICKLES = (_rebuild_mask_hook, _rebuild_masked_module)

# Not for `import *`, but part of the stock module that some tests and libraries call.
_STOCK_HELPERS = (
    _compute_norm,
    _compute_nparams_toprune,
    _validate_pruning_amount,
    _validate_pruning_amount_init,
    _validate_pruning_dim,
    _validate_structured_pruning,
)
