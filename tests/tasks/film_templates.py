"""The templates of a data set of films, as a file."""

FILE = """\
dataset: films
subset: {subset}
templates:
  one-id: !Template
    answer_choices: bad ||| good
    id: one-id
    jinja: '{{{{text}}}} Verdict? ||| {{{{answer_choices[label]}}}}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics:
      - Accuracy
      original_task: true
    name: verdict
    reference: ''
  two-id: !Template
    answer_choices: null
    id: two-id
    jinja: "{second}"
    metadata: !TemplateMetadata
      metrics: []
    name: {name}
    reference: ''
"""


def write(folder, *, subset="null", second="Write. ||| {{text}}", name="author"):
    path = folder / "films" / ("" if subset == "null" else subset) / "templates.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FILE.format(subset=subset, second=second, name=name), encoding="utf-8")
    return path
