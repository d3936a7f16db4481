# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
What ALBEF takes out of questions and captions, but not of answers, before it tokenizes them (its dataset/utils.py).
Lower case is left to the tokenizer, which knows special tokens.
"""

import re


PUNCTUATION = re.compile(r"""[,.'!?"()*#:;~]""")


def clean_question(text: str) -> str:
    """ALBEF's `pre_question`: no punctuation; hyphens and slashes part words."""
    return re.sub("[-/]", " ", PUNCTUATION.sub("", text))


def clean_caption(text: str) -> str:
    """ALBEF's `pre_caption`: as a question, and `<person>`, which stands for a name, is a word."""
    return re.sub("<person>", "person", clean_question(text), flags=re.IGNORECASE)


TEXT_CLEANINGS = {"albef_question": clean_question, "albef_caption": clean_caption}
