//! Lengths and windows as others count them.

use super::ConventionError;
use crate::Window;

/// Lengths from positions of last keys, each the length less one: `seqlens_k` of onnxruntime's
/// GroupQueryAttention.
///
/// -1 is a row without keys.
///
/// # Errors
/// [`ConventionError::LastPosition`] for a position below -1.
///
/// # Examples
/// ```
/// use attention_core::conventions::lengths_of_last_positions;
///
/// assert_eq!(lengths_of_last_positions(&[6, 0, -1])?, [7, 1, 0]);
/// # Ok::<(), attention_core::conventions::ConventionError>(())
/// ```
pub fn lengths_of_last_positions(positions: &[i32]) -> Result<Vec<usize>, ConventionError> {
    (positions.iter().enumerate())
        .map(|(batch, &position)| {
            let position = i64::from(position);
            usize::try_from(position + 1).map_err(|_| ConventionError::LastPosition { batch, position })
        })
        .collect()
}

/// A window from the number of keys on either side of a row's own position, -1 for no bound: `window_size` of
/// FlashAttention and of torch's `varlen_attn`, `left_window_size` and `right_window_size` of ONNX's
/// Attention.
///
/// Those count from a position that is aligned at the bottom right; that is
/// [`QueryOffset::BottomRight`](crate::QueryOffset::BottomRight) here.
///
/// # Errors
/// [`ConventionError::WindowSide`] for a size below -1.
///
/// # Examples
/// ```
/// use attention_core::{Window, conventions::window_of_sides};
///
/// // The own key and 127 before it.
/// assert_eq!(window_of_sides(127, 0)?, Window::new(127, 0));
/// assert_eq!(window_of_sides(-1, 0)?, Window { left: None, right: Some(0) });
/// # Ok::<(), attention_core::conventions::ConventionError>(())
/// ```
pub fn window_of_sides(left: i64, right: i64) -> Result<Window, ConventionError> {
    let side = |side, size: i64| match size {
        -1 => Ok(None),
        _ => usize::try_from(size).map(Some).map_err(|_| ConventionError::WindowSide { side, size }),
    };
    Ok(Window { left: side("left", left)?, right: side("right", right)? })
}

/// The window of a causal row that sees `width` keys, its own among them: `local_window_size` of
/// onnxruntime's GroupQueryAttention, `sliding_window` of the decoders of transformers. -1 is no bound to the
/// left.
///
/// # Errors
/// [`ConventionError::WindowWidth`] for 0, and below -1.
///
/// # Examples
/// ```
/// use attention_core::{Window, conventions::window_of_width};
///
/// // The own key and 127 before it.
/// assert_eq!(window_of_width(128)?, Window::new(127, 0));
/// # Ok::<(), attention_core::conventions::ConventionError>(())
/// ```
pub fn window_of_width(width: i64) -> Result<Window, ConventionError> {
    if width == -1 {
        return Ok(Window { left: None, right: Some(0) });
    }
    match usize::try_from(width) {
        Ok(width @ 1..) => Ok(Window::new(width - 1, 0)),
        _ => Err(ConventionError::WindowWidth { width }),
    }
}
