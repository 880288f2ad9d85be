//! What an optimizer computes, one file a rule.
//!
//! A file has the rule's hyperparameters ([`Hyperparameters`]), which prepare the constants of a step in double
//! precision, and those constants with the update of one element ([`Rule`]) in plain fp32. A rule enters everything else by its line in
//! `rules!`: kernels, state tensors, checks.

mod adagrad;
mod adam;
mod lion;
mod sgd;

pub use adagrad::AdagradParams;
pub use adam::AdamParams;
pub use lion::LionParams;
pub use sgd::SgdParams;

use std::fmt::Debug;

use zeroxide_layout::Moment;

use crate::error::OptimError;
use crate::kernel::Task;
use crate::slot::Slot;

/// The constants of one step of one rule, which all elements share, with the update of one element.
pub(crate) trait Rule: Copy + PartialEq + Debug {
    /// Element of the rule's first tensor; `()` where it has none.
    type First: Slot;
    /// Element of its second one; `()` where it has none.
    type Second: Slot;

    /// The new weight and state. A weight that is NaN has any payload: the codec makes it canonical; moments are
    /// canonical.
    fn update(
        &self,
        weight: f32,
        state: (Self::First, Self::Second),
        gradient: f32,
    ) -> (f32, (Self::First, Self::Second));
}

/// The hyperparameters of a rule.
pub(crate) trait Hyperparameters: Copy + Default + PartialEq + Debug {
    /// What a user calls the rule.
    const NAME: &'static str;
    /// The constants of one step.
    type Step: Prepared;

    /// The rule's tensors, in the order of [`Rule::First`] and [`Rule::Second`].
    fn moments(&self) -> Vec<Moment>;

    /// Checks every field against the range where the update is defined.
    fn validate(&self) -> Result<(), OptimError>;

    /// Prepares step number `step`, counted from 1. `grad_scale` multiplies every gradient first.
    fn prepare(&self, step: u64, grad_scale: f64) -> Self::Step;
}

/// A prepared step: the constants of a [`Rule`], or a choice between rules.
pub(crate) trait Prepared: Copy + PartialEq + Debug {
    /// Applies the step to a tile: calls [`Task::apply`] with a [`Rule`].
    fn run(&self, task: &mut Task<'_, '_, '_>);
}

impl<R: Rule> Prepared for R {
    fn run(&self, task: &mut Task<'_, '_, '_>) {
        task.apply(self);
    }
}

macro_rules! rules {
    ($($(#[$meta:meta])* $name:ident($params:ty)),* $(,)?) => {
        /// An optimizer rule with its hyperparameters.
        #[derive(Clone, Copy, PartialEq, Debug)]
        pub enum Optimizer {
            $($(#[$meta])* $name($params)),*
        }

        /// One step's worth of precomputed constants; see [`Optimizer::prepare`].
        #[derive(Clone, Copy, PartialEq, Debug)]
        pub struct Step(Steps);

        #[derive(Clone, Copy, PartialEq, Debug)]
        enum Steps {
            $($name(<$params as Hyperparameters>::Step)),*
        }

        impl Optimizer {
            /// Every rule, with its default hyperparameters.
            pub fn every() -> Vec<Self> {
                vec![$(Self::$name(<$params>::default())),*]
            }

            /// What a user calls the rule.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$name(_) => <$params as Hyperparameters>::NAME),* }
            }

            /// The rule's own state tensors, with the values that they start from.
            pub fn moments(&self) -> Vec<Moment> {
                match self { $(Self::$name(params) => params.moments()),* }
            }

            /// Checks every hyperparameter against the range where the update is defined.
            pub fn validate(&self) -> Result<(), OptimError> {
                match self { $(Self::$name(params) => params.validate()),* }
            }

            /// Prepares step number `step`, counted from 1, as torch's `state["step"]` is after the update.
            ///
            /// `grad_scale` multiplies every gradient first: `1 / loss_scale`, times the clip factor.
            ///
            /// # Panics
            /// If `step` is zero.
            pub fn prepare(&self, step: u64, grad_scale: f64) -> Step {
                assert!(step >= 1, "steps are counted from 1");
                Step(match self { $(Self::$name(params) => Steps::$name(params.prepare(step, grad_scale))),* })
            }
        }

        impl Step {
            pub(crate) fn run(&self, task: &mut Task<'_, '_, '_>) {
                match &self.0 { $(Steps::$name(step) => step.run(task)),* }
            }
        }

        $(impl From<$params> for Optimizer {
            fn from(params: $params) -> Self {
                Self::$name(params)
            }
        })*
    };
}

rules! {
    /// Adam and `AdamW`.
    Adam(AdamParams),
    /// Lion.
    Lion(LionParams),
    /// Adagrad.
    Adagrad(AdagradParams),
    /// SGD with momentum.
    Sgd(SgdParams),
}

/// What a hyperparameter may be.
#[derive(Clone, Copy)]
pub(crate) enum Range {
    /// A number that fp32 can hold, not negative.
    NonNegative,
    /// In `[0, 1)`.
    BelowOne,
    /// Any number that fp32 can hold.
    Finite,
    /// Zero, or large enough to have a reciprocal after what the rule multiplies it with.
    Epsilon,
}

/// The smallest `eps` but zero: `eps sqrt(1 - beta2^t)`, whose root is 2^-27 at least, must have a reciprocal in fp32.
const MIN_EPS: f64 = 1e-30;

impl Range {
    // The kernels hold every constant as fp32. An eps below MIN_EPS loses its reciprocal there.
    #[expect(clippy::cast_possible_truncation, reason = "overflow is looked for")]
    fn holds(self, value: f64) -> bool {
        let finite = (value as f32).is_finite();
        match self {
            Self::NonNegative => finite && value >= 0.0,
            Self::BelowOne => (0.0..1.0).contains(&value),
            Self::Finite => finite,
            Self::Epsilon => finite && (value == 0.0 || value >= MIN_EPS),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::NonNegative => "a finite number that is not negative",
            Self::BelowOne => "a number in [0, 1)",
            Self::Finite => "a finite number",
            Self::Epsilon => "0, or a number from 1e-30 to 3e38",
        }
    }
}

/// Checks (name, value, what it may be) in order; the error names the first that is outside.
pub(crate) fn check(fields: &[(&'static str, f64, Range)]) -> Result<(), OptimError> {
    match fields.iter().find(|(_, value, range)| !range.holds(*value)) {
        None => Ok(()),
        Some((name, value, range)) => Err(OptimError::Hyperparameter {
            name,
            value: *value,
            expected: range.words(),
        }),
    }
}

/// fp32 tensors of a rule that start at zero.
pub(crate) fn zeros(names: &[&'static str]) -> Vec<Moment> {
    names
        .iter()
        .map(|name| Moment {
            key: zeroxide_layout::StateKey::new(name),
            initial: 0.0,
        })
        .collect()
}

/// A constant as the nearest fp32 value.
#[expect(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
pub(crate) fn nearest(constant: f64) -> f32 {
    constant as f32
}
