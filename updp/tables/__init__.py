"""The papers' tables: what they say of the size of networks, beside what the networks here have."""

from updp.tables.compare import EQUAL as EQUAL
from updp.tables.compare import EXPLAINED as EXPLAINED
from updp.tables.compare import UNEXPLAINED as UNEXPLAINED
from updp.tables.compare import UNKNOWN as UNKNOWN
from updp.tables.compare import Compared as Compared
from updp.tables.compare import Comparison as Comparison
from updp.tables.compare import compare as compare
from updp.tables.read import Dialect as Dialect
from updp.tables.read import Figure as Figure
from updp.tables.read import Paper as Paper
from updp.tables.read import Row as Row
from updp.tables.read import Table as Table
from updp.tables.read import list_tables as list_tables
from updp.tables.read import load_tables as load_tables
