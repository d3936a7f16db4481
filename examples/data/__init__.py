"""
Data of the tasks: files, annotations, images, scenes, streams -> rows -> batches.

One rule for bad items holds everywhere. A bad item is a row of a file or a table, or a pair of a stream, that a task
cannot use, however it comes to be so: a line that is no record, a missing column, a text that is none, a box outside
its image, an image that is missing, broken, of no fixed range of grey values, or smaller than a patch, a text of which
the tokenizer makes no tokens or too many.

- It is named: the file and the row, a reason, the value at fault.
- Files and tables are looked through before training: the first five are named, all are counted, and the run stops.
  Of a stream nothing can be known before: the first one stops it. What only decoding shows (that a GIF, BMP or TIFF is
  cut short) is left to the batch that needs it, which names the row as well.
- It is skipped only where that is asked for, with `--skip_bad_rows` or, of streams, `--max_bad_share`. Images are then
  decoded before training. What is skipped is counted by reason, and of streams named in `bad_pairs-*.jsonl`.
- `check_data.py` finds every one, names it in the same words, and goes on.
"""
