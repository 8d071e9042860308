"""What a denoiser says of x_t: one conversion table between noise, data, score and velocity."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """The posterior mean of the noise given x_t, and all that follows from it (identities 3 to 5).

    Attributes:
        x_t: Noisy input, model units, (B, *shape).
        alpha_t: Signal scale, broadcastable to ``x_t``.
        sigma_t: Noise scale, broadcastable to ``x_t``.
        eps: E[eps | x_t], (B, *shape).
    """

    x_t: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    eps: Tensor

    @classmethod
    def of_x0(cls, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, x0: Tensor) -> "Prediction":
        """The same from E[x_0 | x_t] (identity 4)."""
        return cls(x_t, alpha_t, sigma_t, (x_t - alpha_t * x0) / sigma_t)

    @classmethod
    def of_score(cls, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, score: Tensor) -> "Prediction":
        """The same from grad log p_t(x_t) (identity 3)."""
        return cls(x_t, alpha_t, sigma_t, -sigma_t * score)

    @property
    def x0(self) -> Tensor:
        """E[x_0 | x_t] (identity 4); not defined at level T+1, where alpha is 0."""
        return (self.x_t - self.sigma_t * self.eps) / self.alpha_t

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) (identity 3); not defined at level 0, where sigma is 0."""
        return -self.eps / self.sigma_t

    @property
    def velocity(self) -> Tensor:
        """E[eps - x_0 | x_t], the velocity of the optimal-transport path (identity 5)."""
        return self.eps - self.x0

    def carried_to(self, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
        """x_s = alpha_s x_0 + sigma_s eps: the same data and noise at another level (identity 7)."""
        return alpha_s * self.x0 + sigma_s * self.eps
