"""Specs: one YAML file per architecture, read into a frozen :class:`ArchSpec`. Imports no torch.

``python -m updp.spec FILE...`` checks files against the schema and against themselves.
"""

from updp.spec.files import list_specs as list_specs
from updp.spec.files import load_spec as load_spec
from updp.spec.files import parse_spec as parse_spec
from updp.spec.files import specs_directory as specs_directory
from updp.spec.language import LAYERS as LAYERS
from updp.spec.language import RESERVED_CHOICES as RESERVED_CHOICES
from updp.spec.language import Across as Across
from updp.spec.language import Append as Append
from updp.spec.language import ArchSpec as ArchSpec
from updp.spec.language import BlockGroup as BlockGroup
from updp.spec.language import DataSettings as DataSettings
from updp.spec.language import Flow as Flow
from updp.spec.language import ModelSource as ModelSource
from updp.spec.language import Moment as Moment
from updp.spec.language import Negate as Negate
from updp.spec.language import Node as Node
from updp.spec.language import Opaque as Opaque
from updp.spec.language import Recipe as Recipe
from updp.spec.language import Replace as Replace
from updp.spec.language import Resize as Resize
from updp.spec.language import Step as Step
from updp.spec.language import Sum as Sum
from updp.spec.language import names_in as names_in
from updp.spec.language import walk as walk
from updp.spec.match import match_blocks as match_blocks
from updp.spec.overrides import apply_settings as apply_settings
from updp.spec.settings import STAGES as STAGES
from updp.spec.settings import BlendSettings as BlendSettings
from updp.spec.settings import Schedule as Schedule
from updp.spec.settings import SearchSettings as SearchSettings
from updp.spec.settings import TeacherSettings as TeacherSettings
from updp.spec.settings import TrainSettings as TrainSettings
