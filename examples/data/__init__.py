"""
Data of the tasks: files, annotations, images, scenes and streams to rows to batches.

A bad item is a row of a file or table, or a pair of a stream, that a task cannot use: invalid JSON, a missing column,
an empty text, a text longer than the model's limit, a box outside its image, or an image that is missing, broken,
without a fixed range of grey values or smaller than a patch.

- Its error names the file and the row, a reason and the value.
- Rows are checked before training, and every image is decoded: the first five faults are named, all
  are counted, and the run stops. A stream stops at its first bad pair.
- Bad items are skipped with `--skip_bad_rows` (streams: up to `--max_bad_share`), and counted by reason; those of
  streams are listed in `bad_pairs-*.jsonl`.
- `check_data.py` lists all of them.
"""
