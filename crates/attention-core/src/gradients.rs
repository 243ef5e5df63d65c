//! The set of gradients that a backward call computes.

use crate::Role;

/// A set of gradients: any of those of the query, key, value, bias and sinks.
///
/// ```
/// use attention_core::Gradients; // or `attention::Gradients`, which is the same
///
/// let wanted = Gradients::QKV | Gradients::BIAS;
/// assert!(wanted.contains(Gradients::KEY));
/// assert!(!wanted.contains(Gradients::SINKS));
/// assert_eq!(wanted.to_string(), "dq dk dv dbias");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Vec<Role>", into = "Vec<Role>"))]
pub struct Gradients(u8);

impl Gradients {
    /// No gradient; a backward call with this set is refused.
    pub const NONE: Self = Self(0);
    /// dq, of the query's shape and dtype.
    pub const QUERY: Self = Self(1);
    /// dk, of the key's shape and dtype.
    pub const KEY: Self = Self(2);
    /// dv, of the value's shape and dtype.
    pub const VALUE: Self = Self(4);
    /// dbias, of the bias's shape and dtype: summed over every axis along which the bias was broadcast.
    pub const BIAS: Self = Self(8);
    /// dsinks, of the shape and dtype of the sinks.
    pub const SINKS: Self = Self(16);
    /// dq, dk and dv.
    pub const QKV: Self = Self(7);

    /// Whether every gradient of `other` is in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// This set without the gradients of `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The single gradients of the set, with the role of the tensor that each is written to.
    pub fn iter(self) -> impl Iterator<Item = (Self, Role)> {
        [
            (Self::QUERY, Role::DQuery),
            (Self::KEY, Role::DKey),
            (Self::VALUE, Role::DValue),
            (Self::BIAS, Role::DBias),
            (Self::SINKS, Role::DSinks),
        ]
        .into_iter()
        .filter(move |&(single, _)| self.contains(single))
    }
}

impl std::ops::BitOr for Gradients {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl TryFrom<Vec<Role>> for Gradients {
    type Error = String;

    /// The gradients that are written to the tensors of these roles.
    fn try_from(roles: Vec<Role>) -> Result<Self, String> {
        let all = Self::QKV | Self::BIAS | Self::SINKS;
        roles.into_iter().try_fold(Self::NONE, |set, role| {
            let single = all.iter().find(|&(_, written)| written == role).map(|(single, _)| single);
            single.map(|single| set | single).ok_or_else(|| format!("{role} is not a gradient of an input"))
        })
    }
}

impl From<Gradients> for Vec<Role> {
    fn from(set: Gradients) -> Self {
        set.iter().map(|(_, role)| role).collect()
    }
}

impl std::fmt::Display for Gradients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.iter().map(|(_, role)| role.name()).collect();
        f.pad(&if names.is_empty() { "none".to_owned() } else { names.join(" ") })
    }
}

impl std::fmt::Debug for Gradients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gradients({self})")
    }
}
