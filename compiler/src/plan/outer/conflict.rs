//! Why a request cannot be met: a minimal set of statements that exclude each other.
//!
//! Enters: how many restrictions there are, and whether the request can be met without some of them.
//! Leaves: restrictions that cannot all hold, of which each one is needed for that.
//! Invariant: dropping any one of the conflict makes the request possible, if it alone was the cause.

/// The restrictions that conflict, by the deletion filter (Chinneck 2008, *Feasibility and Infeasibility
/// in Optimization*, ch. 6): each is dropped for good if the rest is still impossible without it.
/// O(n) questions. Empty where dropping all of them does not help.
pub fn conflict(
    n_restrictions: usize,
    is_possible: &mut dyn FnMut(&[usize]) -> bool,
) -> Vec<usize> {
    let all: Vec<usize> = (0..n_restrictions).collect();
    if n_restrictions == 0 || !is_possible(&all) {
        return Vec::new();
    }
    let mut dropped = Vec::new();
    for number in 0..n_restrictions {
        dropped.push(number);
        if is_possible(&dropped) {
            dropped.pop();
        }
    }
    all.into_iter()
        .filter(|number| !dropped.contains(number))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_needed() {
        // Restrictions 1 and 3 exclude each other.
        let mut is_possible = |dropped: &[usize]| dropped.contains(&1) || dropped.contains(&3);
        assert_eq!(conflict(5, &mut is_possible), [1, 3]);
        assert!(conflict(5, &mut |_| false).is_empty());
    }
}
