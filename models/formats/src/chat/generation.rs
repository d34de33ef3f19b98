//! `{% generation %}` blocks: what a template says that the assistant writes.
//!
//! The template engine has no tags of one's own, so a block becomes a filter over its text, which puts a character in
//! front of it and one behind; after rendering they are taken out and their places are the spans. The two are
//! noncharacters of Unicode, which no text interchanged between programs may hold; a conversation with them is refused.
//! A block is a scope, as in transformers: what is set in it is not seen outside.

use super::Rendered;
use serde_json::Value as Json;

pub(super) const FILTER: &str = "mark_generation";
const OPEN: char = '\u{FDD0}';
const CLOSE: char = '\u{FDD1}';

/// A template in which blocks are filters.
pub(super) struct Marked {
    pub text: String,
    /// Whether there were any.
    pub found: bool,
}

/// Rewrites the tags `generation` and `endgeneration`, keeping their signs for white space.
pub(super) fn mark(template: &str) -> Marked {
    let (mut text, mut rest, mut found) = (String::with_capacity(template.len()), template, false);
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        text.push_str(before);
        match tag
            .find("%}")
            .map(|end| (&tag[2..end], &tag[end + 2..]))
            .and_then(|(inner, rest)| Some((rewrite(inner)?, rest)))
        {
            Some((rewritten, after)) => {
                text.push_str(&rewritten);
                (rest, found) = (after, true);
            }
            None => {
                text.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    text.push_str(rest);
    Marked { text, found }
}

/// The tags for what stands between `{%` and `%}`, where that is the start or the end of a block.
fn rewrite(inner: &str) -> Option<String> {
    let sign = |c: Option<char>| c.filter(|c| matches!(c, '-' | '+')).map(String::from).unwrap_or_default();
    let (left, right) = (sign(inner.chars().next()), sign(inner.chars().last()));
    match inner[left.len()..inner.len().max(left.len() + right.len()) - right.len()].trim() {
        "generation" => Some(format!("{{%{left} with %}}{{% filter {FILTER} {right}%}}")),
        "endgeneration" => Some(format!("{{%{left} endfilter %}}{{% endwith {right}%}}")),
        _ => None,
    }
}

/// The filter.
pub(super) fn enclose(text: &str) -> String {
    format!("{OPEN}{text}{CLOSE}")
}

/// Fails where a text of the conversation holds one of the two characters.
pub(super) fn check_unmarked<'a>(mut values: impl Iterator<Item = &'a Json>) -> std::result::Result<(), String> {
    fn is_marked(value: &Json) -> bool {
        match value {
            Json::String(text) => text.contains([OPEN, CLOSE]),
            Json::Array(items) => items.iter().any(is_marked),
            Json::Object(map) => map.values().any(is_marked),
            _ => false,
        }
    }
    if values.any(is_marked) {
        return Err("the conversation holds U+FDD0 or U+FDD1, which are no characters; remove them".into());
    }
    Ok(())
}

/// Takes the characters out. A block inside another counts as part of it.
pub(super) fn unmark(marked: &str) -> Rendered {
    let mut rendered = Rendered { text: String::with_capacity(marked.len()), generation: Vec::new() };
    let (mut depth, mut start) = (0u32, 0);
    for piece in marked.split_inclusive([OPEN, CLOSE]) {
        let text = piece.trim_end_matches([OPEN, CLOSE]);
        rendered.text.push_str(text);
        let here = rendered.text.len();
        if piece.ends_with(OPEN) {
            start = if depth == 0 { here } else { start };
            depth += 1;
        } else if piece.ends_with(CLOSE) {
            depth = depth.saturating_sub(1);
            if depth == 0 && start < here {
                rendered.generation.push(start..here);
            }
        }
    }
    rendered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_become_filters_and_keep_their_signs() {
        let check = |template: &str, expected: &str| assert_eq!(mark(template).text, expected);
        check(
            "a{%- generation %}b{% endgeneration -%}",
            "a{%- with %}{% filter mark_generation %}b{% endfilter %}{% endwith -%}",
        );
        check(
            "{%generation%}{%+ endgeneration+%}",
            "{% with %}{% filter mark_generation %}{%+ endfilter %}{% endwith +%}",
        );
        for other in
            ["{% if generation %}", "{{ generation }}", "{%", "{% generation", "{%-%}", "{%%}", "{%generation-"]
        {
            let marked = mark(other);
            assert_eq!((marked.text.as_str(), marked.found), (other, false));
        }
    }

    #[test]
    fn spans_are_bytes_of_the_text_without_marks() {
        let marked = format!("é{}abc{}d{}{}{}x{}{}", enclose(""), OPEN, OPEN, CLOSE, "e", CLOSE, enclose("yz"));
        let rendered = unmark(&marked);
        assert_eq!(rendered.text, "éabcdexyz");
        let spans: Vec<&str> = rendered.generation.iter().map(|span| &rendered.text[span.clone()]).collect();
        assert_eq!(spans, ["dex", "yz"]);
    }
}
