"""A multiple-choice task of lm-evaluation-harness that small story models can do: which sentence ends the story?

    python benchmarks/story_endings.py ../shared/corpora/tinystories/test.txt --output tasks
    unmask evaluate MODEL --tasks story_endings --tasks-folder tasks --limit 200

Context: a story without its last sentence. Choices: that sentence and the last ones of three other stories. Writes the
questions and the task file; the other stories and the order are drawn with --seed.
"""

import argparse
import json
import random
import re
from pathlib import Path

TASK = """task: story_endings
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1
"""


def split_story(story: str) -> tuple[str, str] | None:
    """(everything before the last sentence, the last sentence); None for a story of one sentence."""
    before, _, last = re.sub(r"(?<=[.!?\"])\s+", "\n", story.strip()).rpartition("\n")
    return (before.replace("\n", " "), last) if before and last else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from unmask.data.readers import read_documents

    stories = [pair for pair in map(split_story, read_documents(options.file)) if pair is not None]
    chance = random.Random(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    questions = options.output / "story_endings.jsonl"
    with questions.open("w") as file:
        for before, last in stories[: options.number]:
            others = [ending for _, ending in chance.sample(stories, 4) if ending != last][:3]
            choices = [last, *others]
            chance.shuffle(choices)
            row = {"query": before, "choices": choices, "gold": choices.index(last)}
            file.write(json.dumps(row) + "\n")
    (options.output / "story_endings.yaml").write_text(TASK.format(file=questions.resolve()))


if __name__ == "__main__":
    main()
