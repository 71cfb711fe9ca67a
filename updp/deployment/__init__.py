"""Networks for inference: every norm folded, every chain of operators in the form that is fastest on this machine."""

from updp.deployment.network import Deployed as Deployed
from updp.deployment.network import deploy as deploy
from updp.deployment.network import fused_chains as fused_chains
from updp.deployment.plan import Choice as Choice
from updp.deployment.plan import Plan as Plan
