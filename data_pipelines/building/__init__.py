"""Building a corpus: a recipe, then three stages that any number of processes, or Apache Beam, run to the same bytes.

    recipe.py     which data sets, splits and rules
    reading.py    reads a unit of some 64 images into a part: encoded examples and what is known about each of them
    planning.py   decides over all parts: duplicates, groups, splits, and which examples make which shard
    sharding.py   writes a shard from the parts
    running.py    runs the tasks of a stage: in this process, in several, or on Beam

A task leaves its result in a file that appears whole or not at all, so that a build that was killed goes on with the
tasks that are missing.
"""
