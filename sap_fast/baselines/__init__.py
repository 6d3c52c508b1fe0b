"""What SAP is compared with: other ways to keep a model safe, and controls of SAP itself.

| | source |
| --- | --- |
| `MixedTrainer` | refusals among the task rows: Bianchi et al. 2024, arXiv:2309.07875 |
| `LisaTrainer` | alternating states with a proximal term: Huang et al. 2024, arXiv:2405.18641 |
| `SAMTrainer` | sharpness-aware minimization: Foret et al. 2021, arXiv:2010.01412 |
| `merge_with_aligned` | merging after the tuning: Farn et al. 2024, arXiv:2412.19512 |
| `PanaceaTrainer` | a perturbation added after the tuning: Wang et al. 2025, arXiv:2501.18100 |
| `freeze_layers` | frozen safety layers, SPPFT: Li et al. 2024, arXiv:2408.17003 |
| `PublishedSAPTrainer` | SAP as its authors released it: Wu et al. 2025, arXiv:2505.16737 |
| `ControlTrainer` | SAP with a random or a flipped probe, or with one part of what its probe does |
| `AveragingTrainer` | SAP with h, or its direction, averaged over steps |

Every trainer takes the arguments of `sap_fast.SAPTrainer` and updates with the same AdamW, so that
what differs is the method alone. Blending without a probe is `SAPTrainer` itself, with
`method="blend"`; AdamW is that with `sap_options={"safety_weight": 0.0}`.
"""

from sap_fast.baselines.averaging import AveragingTrainer
from sap_fast.baselines.controls import ControlTrainer
from sap_fast.baselines.lisa import LisaTrainer
from sap_fast.baselines.merging import merge_with_aligned
from sap_fast.baselines.mixed import MixedTrainer
from sap_fast.baselines.panacea import PanaceaTrainer
from sap_fast.baselines.published import PublishedSAP, PublishedSAPTrainer, published_step
from sap_fast.baselines.safety_layers import SafetyLayers, find_safety_layers, freeze_layers
from sap_fast.baselines.sam import SAMTrainer

__all__ = [
    "AveragingTrainer",
    "ControlTrainer",
    "LisaTrainer",
    "MixedTrainer",
    "PanaceaTrainer",
    "PublishedSAP",
    "PublishedSAPTrainer",
    "SAMTrainer",
    "SafetyLayers",
    "find_safety_layers",
    "freeze_layers",
    "merge_with_aligned",
    "published_step",
]
