//! "Did you mean": the known name nearest to what was typed.

/// The candidate nearest to `typed`, where one is near enough to be meant.
///
/// Near means a Damerau-Levenshtein distance of at most a third of the length, or one being the start of the other.
pub fn nearest<'a>(typed: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let scored = candidates.into_iter().filter_map(|known| {
        let distance = strsim::damerau_levenshtein(&typed.to_lowercase(), &known.to_lowercase());
        let part = typed.len() >= 3 && (known.starts_with(typed) || typed.starts_with(known));
        let near = distance <= typed.len().max(known.len()).div_ceil(3);
        (near || part).then_some((if near { distance } else { distance + 100 }, known))
    });
    scored.min_by_key(|&(distance, _)| distance).map(|(_, known)| known)
}
