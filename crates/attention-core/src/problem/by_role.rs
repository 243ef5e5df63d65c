//! Tensors are stored by the name of their role, so that roles can join without changing what is stored
//! already.

use std::collections::BTreeMap;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserializer, Serialize, Serializer};

use crate::{Role, TensorDesc};

type Tensors = [Option<TensorDesc>; Role::COUNT];

pub(super) fn serialize<S: Serializer>(tensors: &Tensors, serializer: S) -> Result<S::Ok, S::Error> {
    let by_role: BTreeMap<Role, &TensorDesc> =
        Role::every().zip(tensors).filter_map(|(role, desc)| Some((role, desc.as_ref()?))).collect();
    by_role.serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Tensors, D::Error> {
    struct ByRole;

    impl<'de> Visitor<'de> for ByRole {
        type Value = Tensors;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("tensors by role")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tensors, A::Error> {
            let mut tensors = [None; Role::COUNT];
            while let Some((role, desc)) = map.next_entry::<Role, TensorDesc>()? {
                if tensors[role as usize].replace(desc).is_some() {
                    // As for a field that is given twice: one of the two would be ignored.
                    return Err(A::Error::custom(format!("duplicate tensor `{role}`")));
                }
            }
            Ok(tensors)
        }
    }

    deserializer.deserialize_map(ByRole)
}
