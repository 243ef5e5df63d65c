//! Loading of options by the names of their fields, and of tensors whose ranks may not fit.

use crate::{DType, Dims, InvalidCall, Strides, TensorDesc};

/// Implements `Serialize` and `Deserialize` for a struct that derives both with `serde(remote = "Self")`:
/// formats for people (JSON, TOML) must name its fields.
///
/// The derived `Deserialize` takes a list of values in the place of named fields too, which binary formats
/// need. In JSON a list would be options without their names: `[]` would stand for the defaults, whatever was
/// meant.
#[macro_export]
#[doc(hidden)]
macro_rules! fields_by_name {
    ($type:ident { $($field:ident),* $(,)? }) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                // The derived function, which has precedence over this one.
                Self::serialize(self, serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Named;

                impl<'de> serde::de::Visitor<'de> for Named {
                    type Value = $type;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str(concat!("the fields of ", stringify!($type), " by name"))
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<$type, A::Error> {
                        $type::deserialize(serde::de::value::MapAccessDeserializer::new(map))
                    }
                }

                if deserializer.is_human_readable() {
                    deserializer.deserialize_struct(stringify!($type), &[$(stringify!($field)),*], Named)
                } else {
                    Self::deserialize(deserializer)
                }
            }
        }
    };
}

/// A stored description, whose ranks may differ.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(rename = "TensorDesc", deny_unknown_fields, expecting = "a tensor's dtype, shape and strides")]
struct StoredDesc {
    dtype: DType,
    shape: Dims,
    strides: Strides,
}

impl serde::Serialize for TensorDesc {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        StoredDesc { dtype: self.dtype(), shape: self.shape(), strides: self.strides() }.serialize(serializer)
    }
}

impl<'de> serde::Deserialize<'de> for TensorDesc {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let StoredDesc { dtype, shape, strides } = StoredDesc::deserialize(deserializer)?;
        let different = InvalidCall::StridesRank { shape: shape.rank(), strides: strides.rank() };
        Self::strided(dtype, shape, strides).ok_or_else(|| serde::de::Error::custom(different))
    }
}
