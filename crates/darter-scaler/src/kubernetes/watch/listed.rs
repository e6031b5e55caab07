//! Which things of a kind were named, so that it can be said what is gone after a list that began anew.

use std::collections::BTreeSet;

/// At most so many of a kind.
#[derive(Debug)]
pub(super) struct Listed {
    most: usize,
    known: BTreeSet<String>,
    /// Of a list that has begun and is not through.
    coming: Option<BTreeSet<String>>,
}

/// What became of something that was named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    /// It is one of them.
    Taken,
    /// There is no room for it.
    Full,
}

impl Listed {
    pub(super) const fn new(most: usize) -> Self {
        Self { most, known: BTreeSet::new(), coming: None }
    }

    /// A list begins anew.
    pub(super) fn begin(&mut self) {
        self.coming = Some(BTreeSet::new());
    }

    /// It is through: all that there is.
    pub(super) fn end(&mut self) -> BTreeSet<String> {
        if let Some(coming) = self.coming.take() {
            self.known = coming;
        }
        self.known.clone()
    }

    pub(super) fn name(&mut self, id: &str) -> Named {
        if !self.known.contains(id) {
            if self.known.len() >= self.most {
                return Named::Full;
            }
            self.known.insert(id.to_owned());
        }
        if let Some(coming) = &mut self.coming {
            coming.insert(id.to_owned());
        }
        Named::Taken
    }

    /// Whether it was one of them.
    pub(super) fn remove(&mut self, id: &str) -> bool {
        if let Some(coming) = &mut self.coming {
            coming.remove(id);
        }
        self.known.remove(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_list_forgets_what_it_does_not_name_and_a_full_one_takes_no_more() {
        let mut listed = Listed::new(2);
        assert_eq!(
            ["a", "b", "c", "a"].map(|id| listed.name(id)),
            [Named::Taken, Named::Taken, Named::Full, Named::Taken]
        );
        listed.begin();
        listed.name("b");
        assert_eq!(listed.end(), BTreeSet::from(["b".to_owned()]));
        assert!(listed.remove("b") && !listed.remove("a"));
    }
}
