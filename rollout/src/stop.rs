//! Texts that end a sample, looked for while its tokens are drawn.

use crate::RolloutError;

/// Turns one sample's tokens into text as they come.
pub trait TextStream: Send {
    /// Takes the next token; the text that is certain now, which may be none.
    ///
    /// # Errors
    /// What the tokenizer says.
    fn push(&mut self, id: u32) -> Result<String, String>;
}

/// Makes a [`TextStream`] for each sample.
pub type TextSource = Box<dyn Fn() -> Box<dyn TextStream> + Send>;

/// Looks for stop texts in a sample's text; keeps no more of it than could still begin one.
pub(crate) struct StopText {
    stream: Box<dyn TextStream>,
    stops: Vec<String>,
    tail: String,
}

impl std::fmt::Debug for StopText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StopText").field("stops", &self.stops).field("tail", &self.tail).finish_non_exhaustive()
    }
}

impl StopText {
    pub(crate) fn new(stream: Box<dyn TextStream>, stops: &[String]) -> StopText {
        StopText { stream, stops: stops.to_vec(), tail: String::new() }
    }

    /// Whether the text with the next token holds a stop text that reaches into that token's text.
    pub(crate) fn push(&mut self, id: u32) -> Result<bool, RolloutError> {
        let text = self.stream.push(id).map_err(RolloutError::Text)?;
        if text.is_empty() {
            return Ok(false);
        }
        let before = self.tail.len();
        self.tail.push_str(&text);
        let found = self.stops.iter().any(|stop| {
            let mut from = before.saturating_sub(stop.len() - 1);
            while !self.tail.is_char_boundary(from) {
                from += 1;
            }
            self.tail[from..].contains(stop.as_str())
        });
        let longest = self.stops.iter().map(String::len).max().unwrap_or(1);
        let mut cut = self.tail.len().saturating_sub(longest - 1);
        while !self.tail.is_char_boundary(cut) {
            cut -= 1;
        }
        self.tail.drain(..cut);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token `i` is the `i`-th piece.
    struct Pieces(&'static [&'static str]);

    impl TextStream for Pieces {
        fn push(&mut self, id: u32) -> Result<String, String> {
            self.0.get(id as usize).map(|piece| (*piece).to_owned()).ok_or_else(|| format!("no token {id}"))
        }
    }

    fn check(pieces: &'static [&'static str], stops: &[&str], expected: Option<u32>) {
        let stops: Vec<String> = stops.iter().map(|&s| s.into()).collect();
        let mut matcher = StopText::new(Box::new(Pieces(pieces)), &stops);
        let found = (0..pieces.len() as u32).find(|&id| matcher.push(id).unwrap());
        assert_eq!(found, expected, "{pieces:?} {stops:?}");
    }

    #[test]
    fn stop_texts_are_found_across_tokens() {
        check(&["a", "b", "c"], &["bc"], Some(2));
        check(&["the answer", " is", " 4\n", "\nNext"], &["\n\n"], Some(3));
        check(&["", "x", "", "y"], &["xy"], Some(3));
        check(&["abab", "ac"], &["abac"], Some(1));
        check(&["grü", "ße", "é"], &["üßeé"], Some(2));
        check(&["a", "b"], &["ba", "abc"], None);
        check(&["long text with a stop inside", "x"], &["stop", "never"], Some(0));
    }

    #[test]
    fn a_stop_text_is_found_once_and_the_tail_stays_short() {
        let mut matcher = StopText::new(Box::new(Pieces(&["abc", "def"])), &["bc".into()]);
        assert!(matcher.push(0).unwrap());
        assert!(!matcher.push(1).unwrap(), "it does not reach into the new text");
        assert_eq!(matcher.tail, "f");
        assert!(matcher.push(9).is_err());
    }
}
