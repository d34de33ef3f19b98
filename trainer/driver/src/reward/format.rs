//! The shape of a completion: elements such as `<think>...</think><answer>...</answer>`, and its length.

/// Whether `completion` is the elements `tags` in this order, each once and not empty, with only white space between.
pub(crate) fn is_elements(completion: &str, tags: &[String]) -> bool {
    let mut rest = completion.trim();
    for tag in tags {
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        let Some((inside, after)) = rest.strip_prefix(&open).and_then(|r| r.split_once(&close)) else { return false };
        let named = tags.iter().any(|t| inside.contains(&format!("<{t}>")) || inside.contains(&format!("</{t}>")));
        if inside.trim().is_empty() || named {
            return false;
        }
        rest = after.trim_start();
    }
    rest.is_empty()
}

/// What stands in the last `<tag>...</tag>`.
pub(crate) fn last_element<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let end = text.rfind(&close)?;
    let start = text[..end].rfind(&open)? + open.len();
    Some(&text[start..end])
}

/// 1 at `target`, falling in a straight line to 0 at `tolerance` from it.
pub(crate) fn length(tokens: usize, target: usize, tolerance: usize) -> f64 {
    (1.0 - tokens.abs_diff(target) as f64 / tolerance.max(1) as f64).max(0.0)
}

/// DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to `max - buffer`, -1 from `max` on.
pub(crate) fn overlong(tokens: usize, max: usize, buffer: usize) -> f64 {
    let over = tokens.saturating_sub(max.saturating_sub(buffer));
    -(over as f64 / buffer.max(1) as f64).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn elements_in_order_and_nothing_else() {
        let tags = ["think".to_owned(), "answer".to_owned()];
        for (text, expected) in [
            ("<think>a</think><answer>b</answer>", true),
            (" <think>\na\n</think>\n\n<answer>b</answer>\n", true),
            ("<think>a</think><answer></answer>", false),
            ("<think> </think><answer>b</answer>", false),
            ("<think>a</think>and<answer>b</answer>", false),
            ("<answer>b</answer><think>a</think>", false),
            ("<think>a</think><answer>b</answer>.", false),
            ("<think>a<think>b</think><answer>c</answer>", false),
            ("<think>a</think><answer>b</answer><answer>c</answer>", false),
            ("<think>a</think>", false),
            ("a", false),
            ("", false),
        ] {
            assert_eq!(is_elements(text, &tags), expected, "{text:?}");
        }
        assert_eq!(last_element("<answer>1</answer> no, <answer>2</answer>", "answer"), Some("2"));
        assert_eq!(last_element("</answer><answer>", "answer"), None);
    }

    #[test]
    fn dapo_punishes_the_last_tokens() {
        // The published setting: 16384 expected, 4096 more as the buffer.
        let value = |tokens| overlong(tokens, 20480, 4096);
        assert_eq!([value(0), value(16384), value(18432), value(20480), value(30000)], [0.0, 0.0, -0.5, -1.0, -1.0]);
        assert_eq!(
            [length(100, 100, 50), length(75, 100, 50), length(150, 100, 50), length(0, 100, 50)],
            [1.0, 0.5, 0.0, 0.0]
        );
    }

    proptest! {
        #[test]
        fn punishment_never_shrinks_with_length(max in 1usize..500, buffer in 1usize..500, tokens in 0usize..1000) {
            let buffer = buffer.min(max);
            let (here, next) = (overlong(tokens, max, buffer), overlong(tokens + 1, max, buffer));
            prop_assert!((-1.0..=0.0).contains(&here) && next <= here);
        }
    }
}
