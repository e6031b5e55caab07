//! Images that some node has or brings, each under a number for as long as somebody names it.
//!
//! A report names two hundred of them by their digests; decisions count into a list. Numbers are given back when
//! nobody names the image any more, so that the list stays as long as what is there at once.

use std::collections::BTreeMap;

use darter_core::Digest;

use crate::state::{IMAGES_MAX, Image};

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Images {
    numbers: BTreeMap<Digest, u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot {
    image: Image,
    named: u32,
    /// What it can be asked for under, as who said it first has it.
    reference: Option<String>,
}

impl Images {
    /// The number of an image, which is named once more; none where there are too many. Who said its size first
    /// is believed: images do not change it.
    pub(super) fn name(&mut self, digest: Digest, bytes: u64) -> Option<u32> {
        if let Some(number) = self.numbers.get(&digest) {
            self.slots[*number as usize].named += 1;
            return Some(*number);
        }
        let slot = Slot { image: Image { digest, bytes }, named: 1, reference: None };
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = slot;
                number
            }
            None if self.slots.len() < IMAGES_MAX => {
                self.slots.push(slot);
                u32::try_from(self.slots.len() - 1).ok()?
            }
            None => return None,
        };
        self.numbers.insert(digest, number);
        Some(number)
    }

    /// Under which name it can be asked for, unless that is known.
    pub(super) fn call(&mut self, number: u32, reference: impl FnOnce() -> Option<String>) {
        if let Some(slot) = self.slots.get_mut(number as usize)
            && slot.reference.is_none()
        {
            slot.reference = reference();
        }
    }

    /// The name, if somebody knows one.
    pub(super) fn called(&self, number: u32) -> Option<&str> {
        self.slots.get(number as usize)?.reference.as_deref()
    }

    /// It is named once less.
    pub(super) fn forget(&mut self, number: u32) {
        let Some(slot) = self.slots.get_mut(number as usize) else { return };
        slot.named = slot.named.saturating_sub(1);
        if slot.named == 0 && self.numbers.remove(&slot.image.digest).is_some() {
            self.free.push(number);
        }
    }

    pub(super) fn digest(&self, number: u32) -> Option<Digest> {
        self.slots.get(number as usize).map(|slot| slot.image.digest)
    }

    /// The list that numbers count into. One that nobody names keeps its place until another takes it.
    pub(super) fn list(&self) -> Vec<Image> {
        self.slots.iter().map(|slot| slot.image.clone()).collect()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_given_back_once_nobody_names_its_image() {
        let (one, other) = (Digest::from_bytes([1; 32]), Digest::from_bytes([2; 32]));
        let mut images = Images::default();
        assert_eq!((images.name(one, 7), images.name(one, 9), images.name(other, 1)), (Some(0), Some(0), Some(1)));
        assert_eq!(images.list()[0].bytes, 7);
        images.forget(0);
        assert_eq!(images.len(), 2, "one still names it");
        images.forget(0);
        images.forget(0);
        assert_eq!((images.len(), images.name(Digest::from_bytes([3; 32]), 5)), (1, Some(0)));
        assert_eq!(images.list().len(), 2);
    }
}
