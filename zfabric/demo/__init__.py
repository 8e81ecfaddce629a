"""The main job: what a fabric is for, on files that every machine has.

analysis.py  the tasks: pure functions, the same in a slot and in a plain loop
job.py       the driving: one task per file, a tree of merges, an as_completed loop
table.py     what is printed: numbers aligned within 80 columns
bar.py       the progress bar
"""
