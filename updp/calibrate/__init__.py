"""Calibrated pruning: merged operators solved for from a few hundred images without labels.

A block's best affine stand-in is a least-squares problem (the weight reconstruction of EAPruning, for UPDP's merged
blocks). `measure_damage` tells what each block costs alone, `choose` takes the cheapest set, `solve_subnet` solves it.
"""

from updp.calibrate.blocks import Solved as Solved
from updp.calibrate.blocks import SolveSettings as SolveSettings
from updp.calibrate.blocks import solve_blocks as solve_blocks
from updp.calibrate.blocks import solve_subnet as solve_subnet
from updp.calibrate.choose import choose as choose
from updp.calibrate.choose import rank as rank
from updp.calibrate.damage import Damage as Damage
from updp.calibrate.damage import DamageTable as DamageTable
from updp.calibrate.damage import divergence as divergence
from updp.calibrate.damage import measure_damage as measure_damage
from updp.calibrate.damage import network_damage as network_damage
from updp.calibrate.kept import load_operators as load_operators
from updp.calibrate.trail import Images as Images
from updp.calibrate.verify import Verified as Verified
from updp.calibrate.verify import latency_part as latency_part
from updp.calibrate.verify import verify as verify
