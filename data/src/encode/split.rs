//! Text cut into words exactly as the regular expressions of byte-level tokenizers cut it, without running them.
//!
//! Two families of expressions cover the byte-level tokenizers in use: GPT-2's and the one that OpenAI's cl100k made
//! common (Llama 3, Qwen 2 and later, with other limits on runs of digits). Character classes are asked of the very
//! engine that the `tokenizers` library uses, once per page of 256 characters, so that both agree on every character.
//!
//! Invariant (tested against the engine on random text): the pieces are those of the expression. Where this code does
//! not know (a case-insensitive contraction with a non-ASCII letter), it says so and the caller takes the slow way.

use std::sync::OnceLock;
use tangelo_formats::tokenizer::words::cl100k;
use tokenizers::utils::SysRegex;

/// GPT-2's expression, as the library's ByteLevel pre-tokenizer runs it.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Splitter {
    /// GPT-2's expression.
    Gpt2,
    /// GPT-2's expression between digits, each of which is a word.
    Gpt2SingleDigits,
    /// cl100k's with runs of at most this many digits.
    Cl100k { max_digits: usize },
}

/// What an expression asks of a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Space,
    Other,
}

/// A character it cannot decide about.
pub(super) struct Undecided;

impl Splitter {
    /// The splitter that does what `expression` does, if there is one.
    pub(super) fn of_expression(expression: &str) -> Option<Splitter> {
        if expression == GPT2 {
            return Some(Splitter::Gpt2);
        }
        let limits = [(r"\p{N}", 1), (r"\p{N}{1,2}", 2), (r"\p{N}{1,3}", 3)];
        let (_, max_digits) = limits.into_iter().find(|(digits, _)| expression == cl100k(digits))?;
        Some(Splitter::Cl100k { max_digits })
    }

    /// Calls `word` with each word of `text`, in order; their concatenation is `text`.
    pub(super) fn split(self, text: &str, mut word: impl FnMut(&str)) -> Result<(), Undecided> {
        if self == Splitter::Gpt2SingleDigits {
            split_single_digits(text, &mut word);
            return Ok(());
        }
        let mut rest = text;
        while !rest.is_empty() {
            let len = match self {
                Splitter::Cl100k { max_digits } => next_cl100k(rest, max_digits)?,
                _ => next_gpt2(rest),
            };
            let (head, tail) = rest.split_at(len);
            word(head);
            rest = tail;
        }
        Ok(())
    }
}

fn split_single_digits(text: &str, word: &mut impl FnMut(&str)) {
    let between = |mut part: &str, word: &mut dyn FnMut(&str)| {
        while !part.is_empty() {
            let (head, tail) = part.split_at(next_gpt2(part));
            word(head);
            part = tail;
        }
    };
    let mut rest = text;
    while let Some(at) = rest.find(char::is_numeric) {
        between(&rest[..at], word);
        let len = rest[at..].chars().next().map_or(1, char::len_utf8);
        word(&rest[at..at + len]);
        rest = &rest[at + len..];
    }
    between(rest, word);
}

/// Length of the first word by GPT-2's expression. `text` is not empty.
fn next_gpt2(text: &str) -> usize {
    let bytes = text.as_bytes();
    if bytes[0] == b'\'' {
        match (bytes.get(1), bytes.get(2)) {
            (Some(b's' | b't' | b'm' | b'd'), _) => return 2,
            (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => return 3,
            _ => {}
        }
    }
    let start = usize::from(bytes[0] == b' ');
    match class_at(text, start) {
        Some((class, len)) if class != Class::Space => run(text, start + len, |c| c == class),
        _ => spaces(text),
    }
}

/// Length of the first word by cl100k's expression. `text` is not empty.
fn next_cl100k(text: &str, max_digits: usize) -> Result<usize, Undecided> {
    let bytes = text.as_bytes();
    if bytes[0] == b'\''
        && let Some(len) = contraction(bytes)?
    {
        return Ok(len);
    }
    let Some((first, first_len)) = class_at(text, 0) else { return Ok(text.len()) };
    match first {
        Class::Letter => return Ok(run(text, first_len, |c| c == Class::Letter)),
        Class::Number => return Ok(digits(text, max_digits)),
        Class::Space if matches!(bytes[0], b'\r' | b'\n') => return Ok(lines_or_spaces(text)),
        _ => {}
    }
    if let Some((Class::Letter, len)) = class_at(text, first_len) {
        return Ok(run(text, first_len + len, |c| c == Class::Letter));
    }
    let start = usize::from(bytes[0] == b' ');
    Ok(match class_at(text, start) {
        Some((Class::Other, len)) => {
            let end = run(text, start + len, |c| c == Class::Other);
            end + bytes[end..].iter().take_while(|b| matches!(b, b'\r' | b'\n')).count()
        }
        _ => lines_or_spaces(text),
    })
}

/// An English contraction in any case, at an apostrophe.
fn contraction(bytes: &[u8]) -> Result<Option<usize>, Undecided> {
    let lower = |at: usize| bytes.get(at).map(u8::to_ascii_lowercase);
    if bytes.iter().skip(1).take(2).any(|b| !b.is_ascii()) {
        // Case folding maps some letters beyond ASCII to these (U+017F to `s`).
        return Err(Undecided);
    }
    Ok(match (lower(1), lower(2)) {
        (Some(b's' | b't' | b'm' | b'd'), _) => Some(2),
        (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => Some(3),
        _ => None,
    })
}

fn digits(text: &str, max_digits: usize) -> usize {
    let mut end = 0;
    for _ in 0..max_digits {
        match class_at(text, end) {
            Some((Class::Number, len)) => end += len,
            _ => break,
        }
    }
    end
}

/// `\s*[\r\n]+`, else [`spaces`]: a run of white space up to its last line break.
fn lines_or_spaces(text: &str) -> usize {
    let end = run(text, 0, |c| c == Class::Space);
    text.as_bytes()[..end].iter().rposition(|b| matches!(b, b'\r' | b'\n')).map_or_else(|| spaces(text), |at| at + 1)
}

/// `\s+(?!\S)|\s+`: a run of white space, less its last character where a word follows and something is left.
fn spaces(text: &str) -> usize {
    let end = run(text, 0, |c| c == Class::Space);
    if end == text.len() {
        return end;
    }
    let last = text[..end].chars().next_back().map_or(0, char::len_utf8);
    if end > last { end - last } else { end }
}

/// The end of the run of characters for which `holds`, from byte `at` on.
fn run(text: &str, mut at: usize, holds: impl Fn(Class) -> bool) -> usize {
    while let Some((class, len)) = class_at(text, at) {
        if !holds(class) {
            break;
        }
        at += len;
    }
    at
}

/// Class and length in bytes of the character at byte `at`.
#[inline]
fn class_at(text: &str, at: usize) -> Option<(Class, usize)> {
    let &byte = text.as_bytes().get(at)?;
    if byte.is_ascii() {
        return Some((ASCII[byte as usize], 1));
    }
    let c = text[at..].chars().next()?;
    Some((wide_class(c), c.len_utf8()))
}

const ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        let b = byte as u8;
        classes[byte] = match b {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b'\t'..=b'\r' | b' ' => Class::Space,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

const PAGE: usize = 256;
type Page = [Class; PAGE];

/// The class of a character beyond ASCII, as the regex engine has it.
fn wide_class(c: char) -> Class {
    static PAGES: [OnceLock<Box<Page>>; 0x11_0000 / PAGE] = [const { OnceLock::new() }; 0x11_0000 / PAGE];
    let code = c as usize;
    PAGES[code / PAGE].get_or_init(|| Box::new(ask_engine(code / PAGE)))[code % PAGE]
}

fn ask_engine(page: usize) -> Page {
    static ENGINES: OnceLock<Vec<(Class, Option<SysRegex>)>> = OnceLock::new();
    let engines = ENGINES.get_or_init(|| {
        [(Class::Letter, r"\p{L}"), (Class::Number, r"\p{N}"), (Class::Space, r"\s")]
            .map(|(class, expression)| (class, SysRegex::new(expression).ok()))
            .into()
    });
    let mut classes = [Class::Other; PAGE];
    for (offset, found) in classes.iter_mut().enumerate() {
        let Some(c) = char::from_u32((page * PAGE + offset) as u32) else { continue };
        let mut buffer = [0; 4];
        let text: &str = c.encode_utf8(&mut buffer);
        let matches = |engine: &Option<SysRegex>| engine.as_ref().is_some_and(|e| e.find_iter(text).next().is_some());
        if let Some((class, _)) = engines.iter().find(|(_, engine)| matches(engine)) {
            *found = *class;
        }
    }
    classes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(splitter: Splitter, text: &str) -> Option<Vec<String>> {
        let mut words = Vec::new();
        splitter.split(text, |word| words.push(word.to_string())).ok().map(|()| words)
    }

    fn by_engine(expression: &str, text: &str) -> Vec<String> {
        let regex = SysRegex::new(expression).unwrap();
        regex.find_iter(text).map(|(start, end)| text[start..end].to_string()).collect()
    }

    fn hard_text() -> impl Strategy<Value = String> {
        let pieces = prop_oneof![
            "[a-zA-Z0-9]{1,3}",
            "[ \t\n\r]{1,4}",
            "'(s|t|re|ve|m|ll|d|S|LL|x)?",
            "[!-/:-@]{1,2}",
            // Letters, numbers, spaces, marks and symbols beyond ASCII.
            "[\u{e9}\u{6f22}\u{661}\u{2167}\u{b2}\u{a0}\u{3000}\u{85}\u{2028}\u{200b}\u{300}\u{20ac}\u{17f}\u{1F600}\u{1D7D8}\u{1c5}]",
            any::<char>().prop_map(String::from),
        ];
        proptest::collection::vec(pieces, 0..30).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn words_are_those_of_the_expression(text in hard_text()) {
            prop_assert_eq!(words(Splitter::Gpt2, &text), Some(by_engine(GPT2, &text)));
            for (max_digits, digits) in [(1, r"\p{N}"), (3, r"\p{N}{1,3}")] {
                let expression = cl100k(digits);
                prop_assert_eq!(Splitter::of_expression(&expression), Some(Splitter::Cl100k { max_digits }));
                if let Some(found) = words(Splitter::Cl100k { max_digits }, &text) {
                    prop_assert_eq!(found, by_engine(&expression, &text));
                }
            }
        }
    }
}
