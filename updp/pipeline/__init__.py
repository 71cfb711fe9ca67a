"""A run: the stages ``baseline``, ``supernet``, ``search``, ``finetune`` and ``merge``, in this order.

A calibration is a run with the stages ``damage`` and ``calibrate`` in the place of those between baseline and merge.

`updp.pipeline.prepare` checks all that a user asks for and makes the run directory, `updp.pipeline.run` does the
stages that are not finished. Each stage takes its inputs from the run directory and leaves its product there, so it
can be started alone. Only this package knows the order.
"""

from updp.pipeline.directory import Calibration as Calibration
from updp.pipeline.directory import RunDirectory as RunDirectory
from updp.pipeline.directory import RunRecord as RunRecord
from updp.pipeline.watch import Watch as Watch
from updp.report.read import SEARCHED as SEARCHED
from updp.report.read import STAGES as STAGES
