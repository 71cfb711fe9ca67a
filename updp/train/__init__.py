"""Training: one loop, and the stages as small policies on it.

- `Plain` trains an ordinary model (stage `baseline`);
- `Sandwich` trains a supernet (stage `supernet`);
- `Progressive` turns baseline blocks into pruned ones while it trains (stage `finetune`);
- `Distillation` brings a pruned network's features back to its baseline's, without labels (stage `calibrate`).
"""

from updp.train.checkpoint import USUAL as USUAL
from updp.train.checkpoint import Checkpoints as Checkpoints
from updp.train.checkpoint import Every as Every
from updp.train.factory import create_accelerator as create_accelerator
from updp.train.loop import FitResult as FitResult
from updp.train.loop import Progress as Progress
from updp.train.loop import fit as fit
from updp.train.policies import Distillation as Distillation
from updp.train.policies import Plain as Plain
from updp.train.policies import Policy as Policy
from updp.train.policies import Progressive as Progressive
from updp.train.policies import Sandwich as Sandwich
from updp.train.policies import blend_at as blend_at
from updp.train.session import Session as Session
from updp.train.teacher import Teacher as Teacher
