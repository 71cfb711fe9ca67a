"""Searches: they ask an oracle for scores and return subnets."""

from updp.search.cache import CachedOracle as CachedOracle
from updp.search.cache import Oracle as Oracle
from updp.search.genetic import Generation as Generation
from updp.search.genetic import SearchResult as SearchResult
from updp.search.genetic import planned_evaluations as planned_evaluations
from updp.search.genetic import search as search
from updp.search.prefix import PrefixEvaluator as PrefixEvaluator
from updp.search.shared import SharedOracle as SharedOracle
from updp.search.tree import count_block_evaluations as count_block_evaluations
