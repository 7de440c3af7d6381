"""The list of references by author and year, as the text cites them: [Khodak et al., 2021], in the order of the names."""

from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as Plain
from pybtex.style.labels import BaseLabelStyle


class AuthorYear(BaseLabelStyle):
    """'Khodak et al., 2021'; a second work of one label gets a b."""

    def format_labels(self, sorted_entries):
        seen = {}
        for entry in sorted_entries:
            names = [person.rich_last_names for person in entry.persons.get("author", entry.persons.get("editor", []))]
            last = [" ".join(str(part) for part in name) for name in names]
            who = last[0] + (" et al." if len(last) > 2 else f" and {last[1]}" if len(last) == 2 else "") if last else entry.key
            label = ", ".join([who, entry.fields["year"]] if "year" in entry.fields else [who])
            seen[label] = seen.get(label, 0) + 1
            yield label if seen[label] == 1 else f"{label}{chr(96 + seen[label])}"


class Named(Plain):
    default_label_style = AuthorYear


def setup(app):
    register_plugin("pybtex.style.formatting", "named", Named, force=True)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
