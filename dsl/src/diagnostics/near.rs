//! Near names for "did you mean".
//!
//! Enters: a name that does not exist and the names that do. Leaves: the nearest of them, or
//! nothing. Invariant: only names within a third of the word's length (at least one edit) count.

/// The number of edits (insert, delete, replace, swap of neighbors) from `a` to `b`.
/// O(|a| · |b|) time. (Optimal string alignment distance: Levenshtein with transpositions.)
pub fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let width = b.len() + 1;
    let mut table = vec![0; (a.len() + 1) * width];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            let at = i * width + j;
            if i == 0 || j == 0 {
                table[at] = i + j;
                continue;
            }
            let replace = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (table[at - width] + 1)
                .min(table[at - 1] + 1)
                .min(table[at - width - 1] + replace);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(table[at - 2 * width - 2] + 1);
            }
            table[at] = best;
        }
    }
    table.last().copied().unwrap_or(0)
}

/// The candidate nearest to `word`, if any is near enough; ties go to the first.
pub fn nearest<'a, I>(word: &str, candidates: I) -> Option<&'a str>
where
    I: IntoIterator<Item = &'a str>,
{
    // Long words are not names: comparing them costs quadratic time for nothing.
    const LONGEST: usize = 64;
    if word.len() > LONGEST {
        return None;
    }
    let lower = word.to_lowercase();
    let limit = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .filter(|candidate| candidate.len() <= LONGEST)
        .map(|candidate| (distance(&lower, &candidate.to_lowercase()), candidate))
        .filter(|&(edits, candidate)| edits <= limit && edits < candidate.chars().count())
        .min_by_key(|&(edits, _)| edits)
        .map(|(_, candidate)| candidate)
}

/// ``did you mean `mesh`?``, if a candidate is near enough.
pub fn did_you_mean<'a, I>(word: &str, candidates: I) -> Option<String>
where
    I: IntoIterator<Item = &'a str>,
{
    nearest(word, candidates).map(|candidate| format!("did you mean `{candidate}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names() {
        let names = ["mesh", "model", "memory", "pin"];
        assert_eq!(nearest("messh", names), Some("mesh"));
        assert_eq!(nearest("mdoel", names), Some("model"));
        assert_eq!(nearest("PIN", names), Some("pin"));
        assert_eq!(nearest("train", names), None);
        assert_eq!(nearest("x", ["y"]), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("ab", "ba"), 1);
        assert_eq!(distance("", "abc"), 3);
    }
}
