"""Everything that is declared stands in pyproject.toml; this file is where native extensions are added."""

from setuptools import setup

setup()
