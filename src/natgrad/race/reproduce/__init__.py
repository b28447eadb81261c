"""Reproductions: one study per paper, declared in a file of its own, performed and judged by one machinery."""

from natgrad.race.reproduce import fngd, kpsvd, sngd, tkfac, two_level
from natgrad.race.reproduce.study import Study

STUDIES: dict[str, Study] = {file.STUDY.name: file.STUDY for file in (kpsvd, two_level, tkfac, fngd, sngd)}
