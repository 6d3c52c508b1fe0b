"""What SAP is compared with: other ways to keep a model safe, and controls of SAP itself.

| | source |
| --- | --- |
| `MixedTrainer` | refusals among the task rows: Bianchi et al. 2024, arXiv:2309.07875 |
| `LisaTrainer` | alternating states with a proximal term: Huang et al. 2024, arXiv:2405.18641 |
| `SAMTrainer` | sharpness-aware minimization: Foret et al. 2021, arXiv:2010.01412 |
| `interleave` | refusals in the place of task rows: arXiv:2508.06249 |
| `ConstrainedTrainer` | limits on the first tokens of answers: Qi et al. 2024, arXiv:2406.05946 |
| `EMATrainer` | an average of the weights over the steps: arXiv:2508.12531 |
| `AsFTTrainer` | a penalty on updates outside of alignment's directions: arXiv:2506.08473 |
| `project_onto_alignment` | Safe LoRA, a projection after the tuning: arXiv:2405.16833 |
| `derta_loss` | refusals from any place in a harmful answer: Yuan et al. 2024, arXiv:2407.09121 |
| `merge_with_aligned` | merging after the tuning: Farn et al. 2024, arXiv:2412.19512 |
| `PanaceaTrainer` | a perturbation added after the tuning: Wang et al. 2025, arXiv:2501.18100 |
| `AlignedStart` | the aligned model's first tokens, at decoding: Xu et al. 2024, arXiv:2402.08983 |
| `freeze_layers` | frozen safety layers, SPPFT: Li et al. 2024, arXiv:2408.17003 |
| `PublishedSAPTrainer` | SAP as its authors released it: Wu et al. 2025, arXiv:2505.16737 |
| `ControlTrainer` | SAP with a random or a flipped probe, or with one part of what its probe does |
| `AveragingTrainer` | SAP with h, or its direction, averaged over steps |

Every trainer takes the arguments of `sap_fast.SAPTrainer` and updates with the same AdamW, so that
what differs is the method alone. Blending without a probe is `SAPTrainer` itself, with
`method="blend"`; AdamW is that with `sap_options={"safety_weight": 0.0}`, SafeGrad
(arXiv:2508.07172) that with `safety_loss="kl"` and `sap_options={"rule": "project",
"safety_level": None}`, and the nearest to SPARD (arXiv:2605.28030) that with `{"rule": "floor"}`.
"""

from sap_fast.baselines.aligned_start import AlignedStart
from sap_fast.baselines.alignment_direction import AsFTTrainer, project_onto_alignment
from sap_fast.baselines.averaging import AveragingTrainer
from sap_fast.baselines.constrained import ConstrainedTrainer
from sap_fast.baselines.controls import ControlTrainer
from sap_fast.baselines.derta import derta_loss
from sap_fast.baselines.ema import EMATrainer
from sap_fast.baselines.interleaved import interleave
from sap_fast.baselines.lisa import LisaTrainer
from sap_fast.baselines.merging import merge_with_aligned
from sap_fast.baselines.mixed import MixedTrainer
from sap_fast.baselines.panacea import PanaceaTrainer
from sap_fast.baselines.published import PublishedSAP, PublishedSAPTrainer, published_step
from sap_fast.baselines.safety_layers import SafetyLayers, find_safety_layers, freeze_layers
from sap_fast.baselines.sam import SAMTrainer

__all__ = [
    "AlignedStart",
    "AsFTTrainer",
    "AveragingTrainer",
    "ConstrainedTrainer",
    "ControlTrainer",
    "EMATrainer",
    "LisaTrainer",
    "MixedTrainer",
    "PanaceaTrainer",
    "PublishedSAP",
    "PublishedSAPTrainer",
    "SAMTrainer",
    "SafetyLayers",
    "derta_loss",
    "find_safety_layers",
    "freeze_layers",
    "interleave",
    "merge_with_aligned",
    "project_onto_alignment",
    "published_step",
]
