//! A float that can be compared and hashed, by its bits.

/// An f64 that is `Eq` and `Hash` by its bits, so that a `Problem` can be the key of a plan cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FloatBits(u64);

impl FloatBits {
    pub(crate) const fn new(value: f64) -> Self {
        Self(value.to_bits())
    }

    pub(crate) const fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl std::fmt::Debug for FloatBits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.get().fmt(f)
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for FloatBits {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.get().serialize(serializer)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for FloatBits {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::deserialize(deserializer).map(Self::new)
    }
}
